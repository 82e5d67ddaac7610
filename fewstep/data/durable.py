"""Files that are complete and on the disk, or absent, though processes may be killed; and what tells them apart."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fewstep.errors import UserError


def write_durably(path: Path, save: Callable[[Path], object], partial: str | None = None) -> None:
    """Let ``save`` write a file beside ``path``, and give it its name once all of it is on the disk.

    Args:
        path: of the complete file; one that is there is replaced.
        save: writes to the path that it is given.
        partial: name of the unfinished file, for writers that may meet; default made from that of ``path``.

    Raises:
        OSError: the disk is full or does not take it; ``path`` is as it was.
    """
    unfinished = path.with_name(partial or f".{path.name}.partial")
    try:
        save(unfinished)
        unfinished.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files for their owner alone
        flush(unfinished)
        os.replace(unfinished, path)
        flush(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_text_durably(path: Path, text: str) -> None:
    """:func:`write_durably` of a text, in UTF-8."""
    write_durably(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Wait until a folder, with all that is in it, is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Where what is done here is refused (:class:`UserError`), ``folder`` and its parents go again, if they are empty.

    Those that were there before stay.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except UserError:
        with suppress(OSError):  # the first one that holds something, and with it its parents
            for place in made:
                place.rmdir()
        raise


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_json(content: Any) -> Any:
    """What JSON gives back of a content: lists for tuples, texts for what it cannot hold."""
    return json.loads(json.dumps(content, default=str))


def json_sha256(content: Any) -> str:
    """The SHA-256 of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
