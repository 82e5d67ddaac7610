"""A teacher's licence, which its students have too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from yaml import YAMLError

from fewstep.teachers.names import embedded_name, teacher_folder

_LICENSE_KEYS = ("license", "license_name", "license_link")


def teacher_license_of(teacher: str | Path) -> dict[str, str]:
    """The licence fields of the front matter of a teacher's own card; empty where it has none that can be read.

    Args:
        teacher: the teacher's folder. A hub id that is no folder gives nothing: cards are not fetched.
    """
    card = Path(teacher) / "README.md"
    if not card.is_file():
        return {}
    from huggingface_hub.repocard import metadata_load

    try:
        return license_fields(metadata_load(card) or {})
    except (OSError, ValueError, YAMLError):  # a student that is trained is not lost for its teacher's card
        return {}


def license_fields(front_matter: Mapping[str, Any]) -> dict[str, str]:
    """What a card's front matter says of the licence: one called "other" has its name and link beside it."""
    return {key: front_matter[key] for key in _LICENSE_KEYS if isinstance(front_matter.get(key), str)}


def teacher_license(name: str) -> dict[str, str]:
    """The licence fields of the teacher's model card; empty where there is no card, or it names no licence."""
    if embedded_name(name) is not None:
        return {"license": "apache-2.0"}  # they are part of this package
    folder = teacher_folder(name)
    if folder is not None:
        return teacher_license_of(folder)
    try:
        return license_fields(ModelCard.load(name).data.to_dict())
    except (OSError, ValueError, YAMLError, EntryNotFoundError):
        return {}
