"""Parquet files with a column of images, as ``datasets`` writes them; read by pyarrow, a row group at a time.

An image cannot be read alone: with it, all images of its row group are. ``datasets`` writes groups of 100.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.data.shard_index import Samples
from fewstep.data.text_names import LABELS, TEXTS, as_label, only_one
from fewstep.errors import UserError, one_line

_GROUPS = 4  # decoded at a time


@dataclass(eq=False)
class ParquetShard:
    """One file.

    Attributes:
        path: of it.
        text: the column of the texts; None: what is there.
    """

    path: Path
    text: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def read(self, place: tuple[int, int]) -> bytes:
        group, row = place
        with self._lock:  # threads that want the same group wait for the first of them
            column = _group(self, group)
        content = _bytes_of(column[row].as_py())
        if content is None:
            raise OSError("the row holds no image")
        return content

    def samples(self) -> Samples:
        found = Samples()
        file = _file(self)
        image = _image_column(self)
        try:
            names = set(file.schema_arrow.names)
            text = self.text or only_one(TEXTS, names)
            label = only_one(LABELS, names)
        except ValueError as error:
            raise UserError(f"{self.path} {error}") from error
        if text is not None and text not in names:
            raise UserError(f"{self.path} has no column {text}; there are: {', '.join(sorted(names))}")
        for name in sorted(names - {image, text, label}):
            found.passed_over[f"in the column {name}"] += file.metadata.num_rows
        for group, row, shown in self._rows(file, [name for name in (text, label) if name is not None]):
            name = f"row {len(found.names):,}"
            try:
                value, number = shown.get(text), shown.get(label)
                if value is not None and not isinstance(value, str):
                    raise ValueError(f"its {text} is no text")
                place = None if number is None else as_label(number)
            except ValueError as error:
                found.refuse(f"{self.path.name}: {name} ({one_line(error)})")
                value, place = "", 0
            found.names.append(name)
            found.places.append((group, row))
            found.texts.append(value)
            found.labels.append(place)
        for group in range(file.num_row_groups):
            if empty := _empty(file.metadata.row_group(group), image):
                found.refuse(f"{self.path.name}: {empty:,} images of row group {group} are empty", empty)
        return found

    def _rows(self, file: Any, columns: list[str]) -> Iterator[tuple[int, int, dict[Any, Any]]]:
        """Group, row in it and what its columns hold, images apart, of every row."""
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            try:
                rows = file.read_row_group(group, columns).to_pylist() if columns else [{}] * count
            except (OSError, ValueError) as error:  # pyarrow's own errors are of these
                raise UserError(f"{self.path} cannot be read: {one_line(error)}") from error
            yield from ((group, row, shown) for row, shown in enumerate(rows))


def open_parquet(path: Path) -> Any:
    """A file as pyarrow opens it.

    Raises:
        UserError: it cannot be read, or pyarrow is not there.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path.name} is read by pyarrow; pip install 'fewstep[data]'") from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no parquet file that can be read: {one_line(error)}") from error


@functools.lru_cache(64)
def _file(shard: ParquetShard) -> Any:
    return open_parquet(shard.path)


@functools.lru_cache(_GROUPS)
def _group(shard: ParquetShard, group: int) -> Any:
    """The images of a row group, as a column."""
    return _file(shard).read_row_group(group, [_image_column(shard)]).column(0)


def _empty(group: Any, image: str) -> int:
    """How many images of a row group are not there, as far as its statistics say."""
    columns = [group.column(number) for number in range(group.num_columns)]
    own = [one.statistics for one in columns if one.path_in_schema in (image, f"{image}.bytes")]
    return max((one.null_count or 0 for one in own if one is not None), default=0)


def _image_column(shard: ParquetShard) -> str:
    """The name of the column that holds bytes, or tables with bytes in them.

    Raises:
        UserError: there is none, or several.
    """
    import pyarrow

    def holds_bytes(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            return any(one.name == "bytes" and holds_bytes(one.type) for one in kind)
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    path, schema = shard.path, _file(shard).schema_arrow
    found = [one.name for one in schema if holds_bytes(one.type)]
    if len(found) > 1 and "image" in found:
        found = ["image"]
    if len(found) != 1:
        several = f"several columns of bytes ({', '.join(found)})" if found else "no column with images' bytes"
        raise UserError(f"{path} has {several}; its columns are {', '.join(schema.names)}")
    return found[0]


def _bytes_of(value: Any) -> bytes | None:
    return value.get("bytes") if isinstance(value, dict) else value
