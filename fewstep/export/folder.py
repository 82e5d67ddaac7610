"""A student's folder on the disk: whole or absent, and never over somebody else's files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.data.durable import flush, flush_tree
from fewstep.export.about import FILE
from fewstep.export.errors import ExportError


def refuse_occupied(out: Path) -> None:
    """Raises :class:`ExportError` where ``out`` is something else than an older student or an empty folder."""
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file; name a folder for the student")
    if out.is_dir() and any(out.iterdir()) and not (out / FILE).is_file():
        raise ExportError(f"{out} holds something else than a student; name another folder")


@contextmanager
def written(out: Path) -> Iterator[Path]:
    """Gives a new folder to write into; it takes the place of ``out`` when the block ends well, else it goes.

    At any moment, and whatever happens, ``out`` is the older folder, or the new one with all its files on the disk.
    Only a kill between two renames leaves none; then the next call brings the older one back first.
    """
    partial, old = out.parent / f".{out.name}.partial", _aside(out)
    _bring_back(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        flush_tree(partial)
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.rename(out, old)
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _bring_back(out)
        raise
    flush(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_student(out: Path) -> None:
    """Remove a student's folder, so that it is never seen with a part of its files; nothing else is touched."""
    old = _aside(out)
    shutil.rmtree(old, ignore_errors=True)  # of a kill at the same place
    if (out / FILE).is_file():
        os.rename(out, old)
        shutil.rmtree(old)


def _aside(out: Path) -> Path:
    return out.parent / f".{out.name}.old"


def _bring_back(out: Path) -> None:
    """Undo the first of the two renames."""
    if _aside(out).exists() and not out.exists():
        os.rename(_aside(out), out)
