"""A student's folder on the disk: whole or absent, and never over somebody else's files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    """Gives a new folder to write into; it takes the place of ``out`` when the block ends well, else it goes."""
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(partial, out)
    shutil.rmtree(old, ignore_errors=True)
