"""Conditioning on the disk: encoded once, each item alone, in shards that training reads row by row.

A cache's folder holds ``shard_00000.safetensors`` and so on (:mod:`fewstep.conditioning.stacking`), the teacher's
negative in ``negative.safetensors``, and ``index.json``: the teacher's fingerprint, the number of items, and the size
and SHA-256 of every file. A shard is named in the index only when it is complete and on the disk.

Of items with pictures it holds no picture: each is known by its key, and its negative lies beside it.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.item import Item
from fewstep.conditioning.stacking import Stack, from_json, names_in, one_of_each_kind, stack, to_json
from fewstep.data.cache_form import FORMAT, FORMAT_OF_ITEMS, INDEX, damaged, intact, read_index
from fewstep.data.durable import file_sha256, json_sha256, write_durably
from fewstep.data.encoding import encode_one, tensors_of
from fewstep.data.fingerprint import fingerprint
from fewstep.data.items import Items, known_by
from fewstep.data.tensor_rows import TensorRows
from fewstep.errors import UserError
from fewstep.reading import parse_json
from fewstep.recording import Recording
from fewstep.recording.pipeline import is_quantized

_NEGATIVE = "negative.safetensors"
_WHAT = {"prompt": "the prompts or classes", "label": "the prompts or classes", "item": "the items or their pictures"}
_CLOSE = 1e-2  # relative; another text is off by its own size
_CLOSE_IN_HALF = 5e-2  # between encoders in bfloat16 and in float32
_OPEN_SHARDS = 64  # at a time; each is a file and its table of contents, not its content


class ConditionCache:
    """The items of a complete cache, by their number; a :class:`Sequence` of conditionings of one sample.

    Args:
        folder: that :func:`fewstep.cache` wrote.
        progress: show how far the check of its files is, where that takes a while.

    Raises:
        UserError: there is no cache, it is of another version, not complete, or damaged.
    """

    def __init__(self, folder: str | Path, *, progress: bool = False) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        if index is None:
            raise UserError(f"--cache {folder} holds no cache; make one with fewstep cache --out {folder}")
        self.index = index
        if sum(shard["items"] for shard in self.index["shards"]) < self.index["items"]:
            raise UserError(f"the cache {folder} is not complete; go on with it by fewstep cache ... --resume")
        negative = [self.index["negative"]] if self.index["negative"] else []
        for entry in tqdm([*negative, *self.index["shards"]], desc="check the cache", delay=2, disable=not progress):
            if not intact(self.folder, entry):
                raise UserError(damaged(self.folder, entry["file"]))
        self._shard = functools.lru_cache(_OPEN_SHARDS)(self._read)
        self._dtypes: dict[torch.dtype, torch.dtype] = {}
        #: How many draws of each item it holds.
        self.draws: int = index.get("draws", 1)

    def __len__(self) -> int:
        return self.index["items"]

    def __getitem__(self, number: int) -> Conditioning:
        return self.draw(number, 0)

    def draw(self, number: int, draw: int) -> Conditioning:
        """One of the draws of an item."""
        shard, place = divmod(number * self.draws + draw, self.index["shard_size"] * self.draws)
        return self._as_encoded(self._shard(shard)[0][place])

    @property
    def kind(self) -> str:
        """ "prompt", "label" or "item"."""
        return self.index["kind"]

    def items(self) -> list[str] | list[int]:
        """The prompts or labels, in order; of items their keys."""
        return [item for shard in range(len(self.index["shards"])) for item in self._shard(shard)[1]]

    def negative(self) -> Conditioning | None:
        """The teacher's negative; None where it has no classifier-free guidance."""
        negative = self.index["negative"]
        return self._as_encoded(self._open(negative["file"])[0][0]) if negative else None

    def kinds(self) -> list[int]:
        """The number of one item of each structure and shape."""
        shards = range(len(self.index["shards"]))
        found = one_of_each_kind((self._shard(shard)[0] for shard in shards), self.index["shard_size"] * self.draws)
        return list(dict.fromkeys(number // self.draws for number in found))

    def refuse_other_items(self, items: Items) -> None:
        """Raise :class:`UserError` where the items are not those that the cache was made of; the first is named."""
        theirs = self.items()
        if len(items) != len(theirs):
            raise UserError(
                f"the cache {self.folder} is of {len(theirs):,} items, and {items.name} has {len(items):,}; give those "
                "that it was made of, or make another"
            )
        changed = [item for item, key in zip(items.each, theirs, strict=True) if item.key != key]
        if changed:
            raise UserError(
                f"{changed[0]} is not what it was when the cache {self.folder} was made: its row or a picture has "
                f"changed{_and_others(len(changed) - 1)}; put back what it was, or make the cache again"
            )

    def check(self, recording: Recording, teacher: str, fused: bool = False, first: Item | None = None) -> None:
        """Refuse another teacher, and one that encodes otherwise by now, as another version of diffusers may.

        Args:
            recording: of the teacher.
            teacher: its name.
            fused: a LoRA was fused into it: of a cache of its base, what encodes must still be the same.
            first: the first item, of a cache of items.

        Raises:
            UserError: a part that decides the conditioning differs, and is named; or the first item is another one.
        """
        # What a quantised or a changed denoiser was before cannot be seen, and it encodes nothing.
        unseen = {name for name, network in recording.networks.items() if fused or is_quantized(network)}
        refuse_other_teacher(self.folder, self.index, fingerprint(recording), teacher, unseen)
        now = encode_one(recording, self._shard(0)[1][0] if first is None else first)
        if not _close(now, self[0]):
            raise UserError(f"{teacher} encodes otherwise than when the cache {self.folder} was made; make it again")
        pairs = {(a.dtype, b.dtype) for a, b in zip(tensors_of(self[0]), tensors_of(now)) if a.is_floating_point()}
        own = [cached for cached, _ in pairs]
        self._dtypes = {cached: dtype for cached, dtype in pairs if own.count(cached) == 1}

    def _as_encoded(self, item: Conditioning) -> Conditioning:
        """In the dtypes in which the checked teacher encodes."""
        return item.map_tensors(lambda tensor: tensor.to(self._dtypes.get(tensor.dtype, tensor.dtype)))

    def _read(self, shard: int) -> tuple[Stack, list[Any]]:
        entry = self.index["shards"][shard]
        stack, items = self._open(entry["file"])
        if not len(stack) == len(items) * self.draws == entry["items"] * self.draws:
            raise UserError(damaged(self.folder, entry["file"]))
        return stack, items

    def _open(self, name: str) -> tuple[Stack, list[Any]]:
        path = self.folder / name
        try:
            # A row that is asked for is read, and nothing else.
            file = safe_open(str(path), framework="pt")
            content = parse_json(file.metadata()[self.index["format"]])
            groups, items = from_json(content["groups"]), list(content["items"])
            for number, group in enumerate(groups):
                for name in names_in(group.tree):
                    shape = file.get_slice(f"{number}.{name}").get_shape()  # raises where there is no such tensor
                    if name in group.stacked and shape[0] != len(group.items):
                        raise ValueError(f"{name} has {shape[0]} rows for {len(group.items)} items")
            rows = TensorRows(path, [f"{n}.{name}" for n, group in enumerate(groups) for name in group.stacked])
            return Stack(groups, file.get_tensor, rows.row), items
        except (OSError, SafetensorError, LookupError, AttributeError, TypeError, ValueError) as error:
            raise UserError(damaged(self.folder, path.name)) from error


class CacheWriter:
    """Writes a cache, shard after shard; killed at any moment, it goes on where it was.

    A copy of it writes shards of the same cache in another process.

    Args:
        folder: of the cache.
        recording: of the teacher.
        teacher: its name, for people.
        items: all prompts, all labels or all items.
        shard_size: items in one shard.
        resume: go on with what is there.
        source: the file of the items.
        draws: how many of each item are stored.

    Raises:
        UserError: the folder is in use, or holds a cache of something else.
    """

    def __init__(
        self,
        folder: str | Path,
        recording: Recording,
        teacher: str,
        items: Sequence[Any],
        shard_size: int,
        resume: bool,
        source: str | None = None,
        draws: int = 1,
    ) -> None:
        self.folder, self.items, self.size, self.draws = Path(folder), list(items), shard_size, draws
        digests = fingerprint(recording)
        self.index: dict[str, Any]
        wanted = {
            "format": FORMAT_OF_ITEMS if recording.conditional == "item" else FORMAT,
            "kind": recording.conditional,
            "items": len(self.items),
            "items_sha256": json_sha256(known_by(self.items)),
            "shard_size": shard_size,
            **({} if draws == 1 else {"draws": draws}),
        }
        found = read_index(self.folder)
        if found is None:
            _make(self.folder)
            told = {} if source is None else {"source": source}
            self.index = {**wanted, **told, "teacher": teacher, "fingerprint": digests, "negative": None, "shards": []}
        elif not resume:
            raise UserError(f"--out {folder} already holds a cache; add --resume to go on with it, or choose another")
        else:
            refuse_other_teacher(self.folder, found, digests, teacher)
            if changed := [name for name in (*wanted, "draws") if found.get(name, 1) != wanted.get(name, 1)]:
                flags = {"shard_size": "--shard_size", "draws": "--draws"}
                names = ", ".join(dict.fromkeys(flags.get(name, _WHAT[str(recording.conditional)]) for name in changed))
                raise UserError(f"--resume: {names} differ from those of {folder}; choose another --out")
            self.index = found
            # From the first damaged shard on, they are written again.
            whole = itertools.takewhile(functools.partial(intact, self.folder), found["shards"])
            self.index["shards"] = list(whole)
        negative = recording.negative()
        if negative is not None:
            self.index["negative"] = self._write_stack(_NEGATIVE, [negative], [])
        self._save_index()

    @property
    def missing(self) -> range:
        """The numbers of the shards that are still to be written."""
        return range(len(self.index["shards"]), -(-len(self.items) // self.size))

    def of(self, shard: int) -> list[Any]:
        """The prompts or labels of one shard."""
        return self.items[shard * self.size : (shard + 1) * self.size]

    def write(self, number: int, encoded: Sequence[Conditioning]) -> dict[str, Any]:
        """Write a shard. Returns what the index will say of it, once :meth:`enter` is told.

        Raises:
            UserError: the disk is full or does not take it; what was written before is untouched.
        """
        items = self.of(number)
        return {**self._write_stack(f"shard_{number:05d}.safetensors", encoded, items), "items": len(items)}

    def enter(self, shards: Sequence[dict[str, Any]]) -> None:
        """Name the next shards in the index, which were written by this process or by others.

        Raises:
            UserError: the disk is full or does not take it; what was entered before stays.
        """
        self.index["shards"] += shards
        self._save_index()

    def forget(self) -> None:
        """Take away what was begun, for a cache that was refused before it held anything: what is mended is another."""
        for path in (self.folder / INDEX, *self.folder.glob("*.safetensors")):
            path.unlink(missing_ok=True)

    def _write_stack(self, name: str, encoded: Sequence[Conditioning], items: list[Any]) -> dict[str, Any]:
        groups, tensors = stack(encoded)
        # One entry: safetensors writes several in an order of its own, and the same items shall be the same bytes.
        metadata = {self.index["format"]: json.dumps({"groups": to_json(groups), "items": known_by(items)})}
        return self._write(name, lambda path: save_file(tensors, path, metadata))

    def _write(self, name: str, save: Callable[[Path], object]) -> dict[str, Any]:
        """A file, complete or absent, and on the disk before anything names it."""
        path = self.folder / name
        try:
            write_durably(path, save)
            size, digest = path.stat().st_size, file_sha256(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} could not be written ({error}); make room on the disk, then --resume") from error
        return {"file": name, "bytes": size, "sha256": digest}

    def _save_index(self) -> None:
        text = json.dumps({**self.index, "sha256": json_sha256(self.index)}, indent=1, ensure_ascii=False)
        self._write(INDEX, lambda path: path.write_text(text, encoding="utf-8"))


def refuse_other_teacher(
    folder: Path, index: dict[str, Any], mine: dict[str, str], teacher: str, unseen: Set[str] = frozenset()
) -> None:
    """Raises :class:`UserError` where a cache's fingerprint is not ``mine``; the parts that differ are named.

    Parts that are ``unseen`` are not compared.
    """
    theirs = index["fingerprint"]
    names = (theirs.keys() | mine.keys()) - unseen
    if parts := sorted(name for name in names if theirs.get(name) != mine.get(name)):
        what = "with another --call" if parts == ["call"] else f"of another teacher ({index['teacher']})"
        raise UserError(
            f"the cache {folder} was made {what}: its {', '.join(parts)} differs from that of {teacher}; "
            f"make one with fewstep cache --teacher {teacher}"
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # What a kill before the first index left behind is ours.
        others = [path for path in folder.iterdir() if not (path.name.startswith(".") or path.name == _NEGATIVE)]
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made: {error.strerror}") from error
    if others:
        raise UserError(f"--out {folder} is not empty and holds no cache; choose another folder")


def _close(a: Conditioning, b: Conditioning) -> bool:
    """Whether two encodings agree as closely as those of two machines do."""
    tensors = tensors_of(a), tensors_of(b)
    return len(tensors[0]) == len(tensors[1]) and all(
        one.shape == other.shape and bool(((one - other).abs() <= _closeness(one, other) * one.abs().max()).all())
        if one.is_floating_point()
        else torch.equal(one, other)
        for one, other in zip(*tensors)
    )


def _closeness(one: Tensor, other: Tensor) -> float:
    return _CLOSE if one.dtype == other.dtype else _CLOSE_IN_HALF


def _and_others(count: int) -> str:
    return f", and {count:,} more" if count else ""
