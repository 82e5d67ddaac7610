"""What files hold, as cheap digests: the same wherever they lie, and another one when they change under their names.

Files are counted by their folders, so that a record of a million images stays small. A time of modification decides
only whether a folder's files are read again: a copy has other times and the same digest.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fewstep.data.durable import json_sha256

#: The digests of a root's folders, by their names below it ("" for the root itself), as JSON holds them.
Contents = dict[str, dict[str, Any]]

_WHOLE = 2**26  # bytes: smaller files count in full
_BLOCK, _STRIDE = 2**20, 2**24  # of larger ones a block of each stretch counts: any training moves all of it
_SETTLED = 2.0  # seconds: a file that is younger may change again without another time of modification


def contents_of(root: Path, files: Iterable[Path], known: Mapping[str, Mapping[str, Any]] | None = None) -> Contents:
    """The digests of some files, by the folders that they lie in.

    Args:
        root: a folder, whose name does not count; or the only file, whose name does not count either.
        files: below ``root``; one elsewhere, as a list of images may name it, counts by its whole path.
        known: what was found earlier; a folder is not read again where no file's time or size has changed.

    Raises:
        OSError: a file cannot be read.
    """
    folders: dict[str, list[Path]] = {}
    for file in files:
        folders.setdefault(_name(root, file).rpartition("/")[0], []).append(file)
    known = known or {}
    return {folder: _folder(root, sorted(own), known.get(folder, {})) for folder, own in sorted(folders.items())}


def changed_folders(theirs: Mapping[str, Mapping[str, Any]], mine: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names of the folders whose contents differ, or that only one side has."""
    none: dict[str, Any] = {}
    names = theirs.keys() | mine.keys()
    return sorted(n for n in names if theirs.get(n, none).get("sha256") != mine.get(n, none).get("sha256"))


def all_of(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """One digest of all folders."""
    return json_sha256({folder: entry["sha256"] for folder, entry in contents.items()})


def file_digest(path: Path) -> str:
    """The digest of a file's size and content; of a large file's, evenly spaced blocks and its end."""
    size = path.stat().st_size
    state = hashlib.sha256(f"{size}".encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            for block in iter(lambda: file.read(_BLOCK), b""):
                state.update(block)
        else:
            for place in (*range(0, size, _STRIDE), size - _BLOCK):
                file.seek(place)
                state.update(file.read(_BLOCK))
    return state.hexdigest()


def _folder(root: Path, files: list[Path], known: Mapping[str, Any]) -> dict[str, Any]:
    names = [_name(root, file) for file in files]
    stats = [file.stat() for file in files]
    seen = _seen(names, stats)
    digest = known.get("sha256")
    if not digest or known.get("seen") != seen:
        state = hashlib.sha256()
        for name, file in zip(names, files, strict=True):
            state.update(_bytes(f"{name}\0{file_digest(file)}\0"))
        digest = state.hexdigest()
    settled = max(stat.st_ctime for stat in stats) < time.time() - _SETTLED
    size = sum(stat.st_size for stat in stats)
    return {"files": len(files), "bytes": size, "sha256": digest, "seen": seen if settled else None}


def _name(root: Path, file: Path) -> str:
    if file == root:
        return ""
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix()


def _seen(names: list[str], stats: list[os.stat_result]) -> str:
    """What files look like from outside; the times of change and the inodes are those that no program can set back."""
    state = hashlib.sha256()
    for name, stat in zip(names, stats, strict=True):
        state.update(_bytes(f"{name}\0{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}\0"))
    return state.hexdigest()


def _bytes(text: str) -> bytes:
    """UTF-8, but for what of a name is none, which is as it is on the disk."""
    return text.encode("utf-8", "surrogateescape")
