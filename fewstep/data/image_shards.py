"""Sets of images in shards: found, looked through once, and known by their contents."""

from __future__ import annotations

import glob
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fewstep.data.contents import Contents, contents_of
from fewstep.data.durable import json_sha256
from fewstep.data.parquet_shards import ParquetShard
from fewstep.data.shard_index import Member, Shard, ShardIndex
from fewstep.data.tar_shards import TarShard
from fewstep.errors import UserError

_KINDS: dict[str, type[TarShard] | type[ParquetShard]] = {".tar": TarShard, ".parquet": ParquetShard}
_NAMED = 5  # of the samples that cannot be used


def find_shards(source: str) -> list[Path]:
    """The shards that a path means, by name; none where it means something else.

    A path is a shard, a folder of them, or a pattern such as ``DIR/train-*.parquet``.

    Raises:
        UserError: they are of several kinds, or of several sets.
    """
    place = Path(source)
    if place.is_dir():
        found = sorted(path for path in place.iterdir() if path.suffix in _KINDS and not path.name.startswith("."))
    else:
        paths = [place] if place.is_file() else map(Path, glob.glob(source))
        found = sorted(path for path in paths if path.suffix in _KINDS)
    if len(kinds := {path.suffix for path in found}) > 1:
        raise UserError(f"{source} holds shards of several kinds ({', '.join(sorted(kinds))}); give a pattern of one")
    # train-00000-of-00002.parquet and test-00000-of-00001.parquet are two sets.
    sets = {re.sub(r"\d+", "*", path.name): path.name for path in found}
    if len(sets) > 1:
        some = ", ".join(sorted(sets)[:_NAMED])
        raise UserError(f"{source} holds several sets of shards ({some}); give one, as --data '{place}/{min(sets)}'")
    return found


class ImageShards(Sequence[Member]):
    """All images of some shards, as one sequence. No image and no text of them is in memory.

    Args:
        paths: of the shards.
        index: folder in which it is kept what they hold; None: it is kept in memory.
        text: which column, field or suffix has the texts; None: what is there.
        progress: show how far the shards are looked through.

    Attributes:
        passed_over: reason -> number of members that are no data.

    Raises:
        UserError: a shard cannot be read, or samples of it cannot be used; they are named.
    """

    def __init__(self, paths: Sequence[Path], index: Path | None, text: str | None, progress: bool = False) -> None:
        self.shards: list[ShardIndex] = []
        self.passed_over: Counter[str] = Counter()
        for path in tqdm(paths, desc="look through shards", delay=2, disable=not progress):
            shard: Shard = _KINDS[path.suffix](path, text)
            self.shards.append(ShardIndex(shard, index, text or ""))
            self.passed_over.update(self.shards[-1].about["passed_over"])
        self._ends = list(accumulate(map(len, self.shards)))
        self._refuse_bad(text)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        shard, place = self.place(number)
        return shard.member(place)

    def place(self, number: int) -> tuple[ShardIndex, int]:
        """The shard of an image, and its number in it."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = bisect_right(self._ends, number)
        return self.shards[shard], number - (self._ends[shard - 1] if shard else 0)

    @cached_property
    def texts(self) -> Texts | None:
        """What each image shows, where the shards say so."""
        return Texts(self) if self._count("texts") else None

    @property
    def labels(self) -> list[int] | None:
        """Likewise, as numbers."""
        return [label for shard in self.shards for label in shard.labels()] if self._count("labels") else None

    def contents(self, known: Contents | None = None) -> Contents:
        """The digest of each shard, see :func:`fewstep.data.contents.contents_of`; what images show counts in full."""
        found: Contents = {}
        root = Path(os.path.commonpath([shard.shard.path.parent for shard in self.shards]))
        for shard in self.shards:
            path = shard.shard.path
            name = path.relative_to(root).as_posix()
            before = (known or {}).get(name, {})
            (entry,) = contents_of(path, [path], {"": {**before, "sha256": before.get("file")}}).values()
            both = json_sha256([entry["sha256"], shard.about["sha256"]])
            found[name] = {**entry, "file": entry["sha256"], "sha256": both}
        return found

    def _count(self, what: str) -> int:
        return sum(shard.about[what]["count"] for shard in self.shards)

    def _refuse_bad(self, text: str | None) -> None:
        bad = [reason for shard in self.shards for reason in shard.about["bad"]]
        count = sum(shard.about["bad_count"] for shard in self.shards)
        for what, name in (("texts", text or "text"), ("labels", "label")):
            have = self._count(what)
            if have and have < len(self):
                count += len(self) - have
                lacking = ((one.shard.path.name, key) for one in self.shards for key in one.about[what]["without"])
                bad += [f"{path}: {key} has no {name}" for path, key in lacking]
        if text is not None and not self._count("texts") and len(self):
            raise UserError(f"--data_text {text}: no image has one")
        if count:
            named = ", ".join(bad[:_NAMED]) + (", ..." if count > len(bad[:_NAMED]) else "")
            raise UserError(f"{count:,} samples of --data cannot be used: {named}; mend or remove them")
        if not len(self):
            raise UserError(f"--data: {', '.join(one.shard.path.name for one in self.shards[:_NAMED])} hold no image")


class Texts(Sequence[str]):
    """What the images of some shards show, read when they are asked for."""

    def __init__(self, images: ImageShards) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        shard, place = self._images.place(number)
        return shard.text(place)

    def __iter__(self) -> Iterator[str]:
        for shard in self._images.shards:
            yield from shard.texts()
