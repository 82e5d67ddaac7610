"""The folder of an evaluation: it is that of one protocol, and whoever comes with another one is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.data.durable import write_text_durably
from fewstep.errors import UserError
from fewstep.reading import read_json

_NAME = "protocol.json"
_WORDS = {"num": "another --num", "seed": "another --seed", "conditions_sha256": "other prompts or classes"}


def claim(out: Path, protocol: Mapping[str, Any]) -> None:
    """Make the folder that of a protocol, or go on with what is there.

    Rows of different protocols do not compare, and a report of theirs would take the place of the one that is there.

    Args:
        out: the folder.
        protocol: what the rows' numbers depend on beside their models.

    Raises:
        UserError: it is that of another protocol, or cannot be written.
    """
    path = out / _NAME
    if path.is_file():
        try:
            theirs = dict(read_json(path))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged; remove it to go on with what is in {out}") from error
        if changed := sorted(name for name in {*theirs, *protocol} if theirs.get(name) != protocol.get(name)):
            words = [_WORDS.get(name, f"another {name}") for name in changed if name != "digest"]
            raise UserError(f"{out} holds an evaluation with {', '.join(words)}; choose another --out")
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text_durably(path, json.dumps(protocol, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}") from error
