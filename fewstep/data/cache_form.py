"""The index of a cache of conditions: read, and held to the form that one has; anybody can make its digest."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

from fewstep.data.durable import file_sha256, json_sha256
from fewstep.errors import UserError
from fewstep.reading import Kinds, misfit, read_json

FORMAT = "fewstep-cache-2"
#: Of items with pictures, each with its further answers.
FORMAT_OF_ITEMS = "fewstep-cache-3"
INDEX = "index.json"

_OF_INDEX: Kinds = {
    "kind": str,
    "items": int,
    "shard_size": int,
    "teacher": str,
    "fingerprint": dict,
    "negative": (dict, type(None)),
    "shards": list,
}
_OF_FILE: Kinds = {"file": str, "bytes": int, "sha256": str}


def is_well_formed(index: dict[str, Any]) -> bool:
    """Whether an index says what one says, and names files of its own folder alone: a digest can be made by anybody."""
    negative, shards = index.get("negative"), index.get("shards")
    entries = [*([] if negative is None else [negative]), *(shards if isinstance(shards, list) else [])]
    if misfit(index, _OF_INDEX) or any(misfit(entry, _OF_FILE) for entry in entries):
        return False
    if misfit(index, {"source": str}, ("source",)) or misfit(index, {"draws": int}, ("draws",)):
        return False
    if index.get("draws", 1) < 1:
        return False
    if any(misfit(entry, {"items": int}) for entry in index["shards"]) or min(index["items"], index["shard_size"]) < 1:
        return False
    return all(PurePath(entry["file"]).name == entry["file"] for entry in entries)


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a cache; None where the folder holds none.

    Raises:
        UserError: it is damaged, or of another version.
    """
    try:
        index = read_json(folder / INDEX)
        known, digest = index["format"] in (FORMAT, FORMAT_OF_ITEMS), index.pop("sha256", None)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(damaged(folder, INDEX)) from error
    if not known:
        theirs = index["format"]
        raise UserError(
            f"the cache {folder} is of another version of fewstep ({theirs!r}, not {FORMAT!r}); make it again"
        )
    if digest != json_sha256(index) or not is_well_formed(index):
        raise UserError(damaged(folder, INDEX))
    return index


def intact(folder: Path, entry: dict[str, Any]) -> bool:
    """Whether a file of a cache is what was written."""
    path = folder / entry["file"]
    try:
        return path.stat().st_size == entry["bytes"] and file_sha256(path) == entry["sha256"]
    except OSError:
        return False


def damaged(folder: Path, name: str) -> str:
    """What is said of a file that is not what was written."""
    return f"the cache {folder} is damaged: {name} is not what was written; make the cache again"
