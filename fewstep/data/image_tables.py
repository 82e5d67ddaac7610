"""Folders of images with a file that says what they show: a table of all of them, or a text beside each."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fewstep.data.text_names import LABELS, TEXTS, as_label, only_one
from fewstep.errors import UserError
from fewstep.reading import parse_json

#: Tables as ``datasets`` has them in a folder of images: one row for each, ``file_name`` and what it shows.
TABLES = ("metadata.jsonl", "metadata.csv")
_NAMED = 5  # of the images that have no text


def find_table(folder: Path) -> Path | None:
    """The table of a folder of images; None where it has none.

    Raises:
        UserError: it has two.
    """
    found = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} has both {' and '.join(TABLES)}; leave one of them there")
    return found[0] if found else None


def read_table(table: Path, text: str | None) -> tuple[list[Path], list[str] | None, list[int] | None]:
    """The images that a table lists, and what they show: texts, labels or both.

    Args:
        table: of :data:`TABLES`.
        text: which column has the texts; None: the one that is there.

    Raises:
        UserError: it cannot be read, or a row cannot be used; its line is named.
    """
    files: list[Path] = []
    texts: list[Any] = []
    labels: list[Any] = []
    for number, content in _rows(table):
        line = f"{table}, line {number}"
        try:
            row = parse_json(content) if isinstance(content, str) else content
            name, label = text or only_one(TEXTS, row), only_one(LABELS, row)
            files.append(table.parent / row["file_name"])
            if name is None and label is None:
                raise KeyError("text")
            texts.append(None if name is None else row[name])
            labels.append(None if label is None else as_label(row[label]))
        except (ValueError, KeyError, TypeError) as error:
            why = f" ({error})" if isinstance(error, ValueError) else ""
            raise UserError(f"{line}: wants file_name and {text or 'text'} or label{why}") from error
        if name is not None and not isinstance(texts[-1], str):
            raise UserError(f"{line}: the text must be a string, not {texts[-1]!r}")
        for values in (texts, labels):
            if (values[-1] is None) != (values[0] is None):
                raise UserError(f"{line}: give every image a text, or every image a label")
        if not files[-1].is_file():
            raise UserError(f"{line}: there is no file {files[-1]}")
    if not files:
        raise UserError(f"{table} is empty")
    return files, texts if texts[0] is not None else None, labels if labels[0] is not None else None


def read_texts_beside(files: Sequence[Path], passed_over: Counter[str]) -> list[str] | None:
    """The content of the ``.txt`` of the same name beside each image; None where no image has one.

    Args:
        files: the images.
        passed_over: what was taken for no data; the texts are taken out.

    Raises:
        UserError: some images have one and others have not, or one is not UTF-8.
    """
    beside = [file.with_suffix(".txt") for file in files]
    there = [path.is_file() for path in beside]
    if not any(there):
        return None
    if not all(there):
        lacking = [str(file) for file, one in zip(files, there, strict=True) if not one]
        more = ", ..." if len(lacking) > _NAMED else ""
        raise UserError(
            f"{len(lacking):,} of {len(files):,} images of --data have no .txt beside them, and the others have: "
            f"{', '.join(lacking[:_NAMED])}{more}"
        )
    passed_over[".txt"] -= len(set(beside))
    try:
        return [_read(path).strip() for path in beside]
    except UnicodeDecodeError as error:
        bad = next(path for path in beside if not _is_text(path))
        raise UserError(f"{bad} is not UTF-8 text") from error


def _rows(table: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a table with the numbers of their lines; those of JSON as they are written."""
    try:
        if table.suffix == ".csv":
            reader = csv.DictReader(io.StringIO(_read(table), newline=""))
            for row in reader:
                yield reader.line_num, {name: value for name, value in row.items() if value is not None}
            return
        # Not splitlines: a text may hold the other characters that it takes for the end of a line.
        content = _read(table).rstrip()
        yield from enumerate(content.split("\n") if content else [], 1)
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not UTF-8 text") from error
    except csv.Error as error:
        raise UserError(f"{table} is no table that can be read: {error}") from error


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig")


def _is_text(path: Path) -> bool:
    try:
        _read(path)
    except UnicodeDecodeError:
        return False
    return True
