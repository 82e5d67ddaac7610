"""No path of this machine is published with a student."""

from __future__ import annotations

import json
import logging
from pathlib import Path, PureWindowsPath
from typing import Any

logger = logging.getLogger(__name__)

#: Endings of the settings in which libraries write down where a part was loaded from.
_ORIGINS = ("name_or_path", "_file")


def publish_no_paths(folder: Path, base_model: str) -> None:
    """Take paths out of the settings in a folder: where a part was loaded from means nothing elsewhere.

    diffusers writes it into the configuration of what it saves, and older versions of transformers into a tokenizer's,
    so that it may also come with a copied file, of this machine or of its author's. Such a setting is the base model's
    name then, or null where it named a single file; nothing else in a file is touched, and a file without such a
    setting stays as it is, to the byte.

    Args:
        folder: of the student.
        base_model: what the teacher is called in public.
    """
    for path in folder.rglob("*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # a part of the teacher, and a student is not lost for it
            logger.warning("%s is copied as it is: %s", path.name, error)
            continue
        published = _published(content, base_model)
        if published != content:
            path.write_text(json.dumps(published, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _published(value: Any, base_model: str) -> Any:
    if isinstance(value, list):
        return [_published(child, base_model) for child in value]
    if not isinstance(value, dict):
        return value
    return {name: _origin(name, child, base_model) for name, child in value.items()}


def _origin(name: str, value: Any, base_model: str) -> Any:
    if not isinstance(value, str) or not name.endswith(_ORIGINS):
        return _published(value, base_model)
    if not value or not (Path(value).is_absolute() or PureWindowsPath(value).is_absolute() or Path(value).exists()):
        return value
    return base_model if name.endswith("name_or_path") else None
