"""What the index of a cache of conditions may look like; anybody can make its digest."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from fewstep.reading import Kinds, misfit

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
    if any(misfit(entry, {"items": int}) for entry in index["shards"]) or min(index["items"], index["shard_size"]) < 1:
        return False
    return all(PurePath(entry["file"]).name == entry["file"] for entry in entries)
