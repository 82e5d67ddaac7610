"""What is in one shard of images: where each lies, what it is called, and what it shows; looked for once, and kept.

An index is a safetensors file that is called by what its shard looks like from outside (path, size, times, inode), so
that none is ever taken for that of another shard. It holds no image.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from fewstep.data.durable import json_sha256, write_durably
from fewstep.data.packed_texts import pack, unpack
from fewstep.errors import UserError

#: The folder of indices in a run's folder.
INDEX_FOLDER = "data_index"
_FORMAT = "fewstep-shard-index-1"
_OPEN = 256  # indices at a time; each is a file and its table of contents
_NO_LABEL = torch.iinfo(torch.int64).min
_NAMED = 5  # of the samples that lack something


@dataclass
class Samples:
    """What a shard was found to hold; the lists have an entry for each image.

    Attributes:
        names: of the images, as the shard calls them.
        places: two numbers that the shard reads an image by.
        texts: what the images show, where it says so.
        labels: likewise, as numbers.
        bad: what is wrong, in words: the first few.
        bad_count: how much is.
        passed_over: reason -> number of members that are no data.
    """

    names: list[str] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    texts: list[str | None] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    bad_count: int = 0
    passed_over: Counter[str] = field(default_factory=Counter)

    def refuse(self, reason: str, count: int = 1) -> None:
        """Something is wrong, once or several times."""
        self.bad_count += count
        if len(self.bad) < _NAMED:
            self.bad.append(reason)


class Shard(Protocol):
    """A file with many images."""

    @property
    def path(self) -> Path:
        """Where it lies."""
        ...

    def samples(self) -> Samples:
        """What it holds.

        Raises:
            UserError: it cannot be read, or is of another form.
        """
        ...

    def read(self, place: tuple[int, int]) -> bytes:
        """The bytes of an image. Raises :class:`OSError` where the shard does not give them."""
        ...


@dataclass(frozen=True)
class Member:
    """An image in a shard, see :class:`fewstep.data.image_opening.Stored`."""

    shard: Shard
    name: str
    place: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.shard.path.name}: {self.name}"

    def read(self) -> bytes:
        """Its bytes."""
        return self.shard.read(self.place)


class ShardIndex:
    """The index of one shard, kept in a folder or, without one, in memory.

    Args:
        shard: whose.
        folder: where indices are kept.
        asked: what else decides what the index holds: which texts are read.

    Attributes:
        about: counts, and what is wrong.

    Raises:
        UserError: the shard cannot be read, or the index not be written.
    """

    def __init__(self, shard: Shard, folder: Path | None, asked: str) -> None:
        self.shard = shard
        self._memory: bytes | None = None
        self._file: Path | None = None
        if folder is None:
            self._memory = _content(shard.samples())
        else:
            stat = shard.path.stat()
            seen = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            name = json_sha256([_FORMAT, str(shard.path.resolve()), seen, asked])[:32]
            self._file = folder / f"{name}.safetensors"
            if not _is_whole(self._file):
                _write(self._file, _content(shard.samples()))
        self.about: dict[str, Any] = json.loads(self._metadata()[_FORMAT])

    def __len__(self) -> int:
        return self.about["count"]

    def member(self, number: int) -> Member:
        """One image."""
        first, second = (int(part) for part in self._row("places", number))
        return Member(self.shard, self._text("names", number), (first, second))

    def text(self, number: int) -> str:
        """What an image shows; empty where nothing says it."""
        return self._text("texts", number)

    def texts(self) -> list[str]:
        """What all images show."""
        return unpack(self._all("texts_ends"), self._all("texts"))

    def labels(self) -> list[int]:
        """What all images show, as numbers."""
        return self._all("labels").tolist()

    def _text(self, name: str, number: int) -> str:
        first = int(self._row(f"{name}_ends", number - 1)) if number else 0
        last = int(self._row(f"{name}_ends", number))
        return self._part(name, first, last).numpy().tobytes().decode()

    def _row(self, name: str, number: int) -> Tensor:
        return self._part(name, number, number + 1)[0]

    def _part(self, name: str, first: int, last: int) -> Tensor:
        if self._file is not None:
            return _opened(self._file).get_slice(name)[first:last]
        return self._loaded[name][first:last]

    def _all(self, name: str) -> Tensor:
        return self._loaded[name] if self._file is None else _opened(self._file).get_tensor(name)

    @functools.cached_property
    def _loaded(self) -> dict[str, Tensor]:
        assert self._memory is not None  # where there is no file
        return load(self._memory)

    def _metadata(self) -> dict[str, str]:
        if self._file is not None:
            return _opened(self._file).metadata()
        assert self._memory is not None
        return json.loads(self._memory[8 : 8 + int.from_bytes(self._memory[:8], "little")])["__metadata__"]


@functools.lru_cache(_OPEN)
def _opened(path: Path) -> Any:
    # Memory-mapped: what is asked for is read, and nothing else.
    return safe_open(str(path), framework="pt")


def _is_whole(path: Path) -> bool:
    try:
        return _FORMAT in (_opened(path).metadata() or {})
    except (OSError, SafetensorError):
        return False


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Processes that do not know of each other may look through the same shard; they write the same.
        write_durably(path, lambda unfinished: unfinished.write_bytes(content), f".{path.name}.{os.getpid()}.partial")
    except OSError as error:
        raise UserError(f"{path} could not be written ({error}); make room on the disk") from error


def _content(samples: Samples) -> bytes:
    """The file of an index."""
    count = len(samples.names)
    labels = [_NO_LABEL if label is None else label for label in samples.labels]
    tensors = {
        "places": torch.tensor(samples.places, dtype=torch.int64).reshape(count, 2),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }
    for name, texts in (("names", samples.names), ("texts", [text or "" for text in samples.texts])):
        tensors[f"{name}_ends"], tensors[name] = pack(texts)
    about = {
        "count": count,
        "bad": samples.bad,
        "bad_count": samples.bad_count,
        "passed_over": samples.passed_over,
        "texts": _there(samples.texts, samples.names),
        "labels": _there(samples.labels, samples.names),
        "sha256": json_sha256([samples.names, samples.places, samples.texts, samples.labels]),
    }
    return save(tensors, {_FORMAT: json.dumps(about)})


def _there(values: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    """How many images have one, and the first that have none."""
    without = [name for name, value in zip(names, values, strict=True) if value is None]
    return {"count": len(names) - len(without), "without": without[:_NAMED]}
