"""The rows of a file of items, as they are written: JSON lines, or parquet with pictures as paths or as bytes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.data.parquet_shards import open_parquet
from fewstep.errors import UserError, one_line
from fewstep.reading import parse_json

#: The file that a folder of items holds.
TABLE = "items.jsonl"


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: for messages, such as "row 3 of items.jsonl".
        values: by column, null left out; bytes as what gives them (:class:`fewstep.data.image_opening.Stored`).
    """

    name: str
    values: Mapping[str, Any]


def items_file(source: str | Path) -> Path:
    """The file that ``--items`` means, of which a folder has one.

    Raises:
        UserError: there is none, or it is of another kind.
    """
    path = Path(source)
    path = path / TABLE if path.is_dir() else path
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--items takes a .jsonl or .parquet file, or a folder with {TABLE} in it, not {source}")
    if not path.is_file():
        raise UserError(f"--items: there is no file {path}")
    return path


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a file in their order, numbered from 1.

    Raises:
        UserError: the file cannot be read, or a line is no row; its number is named.
    """
    yield from _parquet(path) if path.suffix == ".parquet" else _lines(path)


def _lines(path: Path) -> Iterator[Row]:
    try:
        # Not splitlines: a text may hold the other characters that it takes for the end of a line.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"cannot read --items {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--items {path} is not UTF-8 text") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name = f"row {number} of {path.name}"
        try:
            values = parse_json(line)
        except ValueError as error:
            raise UserError(f"{name} is no JSON: {one_line(error)}") from error
        if not isinstance(values, dict):
            raise UserError(f"{name} is no JSON table of a pipeline's arguments")
        yield _row(name, values)


def _row(name: str, values: Mapping[str, Any]) -> Row:
    return Row(name, {column: value for column, value in values.items() if value is not None})


@dataclass(frozen=True)
class _Held:
    """Bytes in a parquet file; as a text it is the place."""

    path: Path
    group: int
    row: int
    column: str
    place: int | None

    def __str__(self) -> str:
        return f"{self.column} of {self.path.name}"

    def read(self) -> bytes:
        stat = self.path.stat()
        version = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)
        value = _group(self.path, version, self.group, self.column)[self.row].as_py()
        return _bytes_of(value if self.place is None else value[self.place])


def _bytes_of(value: Any) -> bytes:
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise OSError("there are no bytes any more")
    return content


def _parquet(path: Path) -> Iterator[Row]:
    file, number = open_parquet(path), 0
    for group in range(file.num_row_groups):
        try:
            rows = file.read_row_group(group).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's own errors are of these
            raise UserError(f"--items {path} cannot be read: {one_line(error)}") from error
        for place, values in enumerate(rows):
            number += 1
            told = {name: _told(value, _Held(path, group, place, name, None)) for name, value in values.items()}
            yield _row(f"row {number} of {path.name}", told)


def _told(value: Any, held: _Held) -> Any:
    """A value of a row; bytes, as they are or as ``datasets`` writes pictures, in the place where they lie."""
    if isinstance(value, list):
        return [_told(child, _Held(held.path, held.group, held.row, held.column, n)) for n, child in enumerate(value)]
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        return held if value.get("bytes") is not None else value.get("path")
    return held if isinstance(value, bytes) else value


@functools.lru_cache(2)
def _group(path: Path, version: tuple[int, ...], group: int, column: str) -> Any:
    """A column of a row group; another version of a file is another file."""
    return open_parquet(path).read_row_group(group, [column]).column(0)
