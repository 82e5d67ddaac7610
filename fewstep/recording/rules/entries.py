"""Which entries of one tensor are copies of another's entries: found by value, kept as a block where they are one.

Channels beside a sample, tokens before or behind it, frames that are not stepped and frames that are mixed in are all
the same to this file: some entries of a network's argument are entries of the sample, and the others are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# An odd number, so that the digests of several runs' values rarely collide; what they say is checked by value.
_MIXER = 0x9E3779B97F4A7C15 - (1 << 64)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Block:
    """Entries in a row along one axis.

    Attributes:
        axis: counted with the batch axis, which is 0.
        start: entries before them, or with `from_end` entries behind them: the other side may be of any length.
        length: how many.
        from_end: see `start`.
    """

    axis: int
    start: int
    length: int
    from_end: bool = False

    def first(self, size: int) -> int:
        """Where they begin in an axis of `size` entries."""
        return size - self.start - self.length if self.from_end else self.start

    def of(self, value: Tensor) -> Tensor:
        """These entries of a tensor (B, ...)."""
        return value.narrow(self.axis, self.first(value.shape[self.axis]), self.length)

    def others(self, value: Tensor) -> Tensor:
        """The other entries of a tensor (B, ...), those before joined to those behind."""
        first, size = self.first(value.shape[self.axis]), value.shape[self.axis]
        if not 0 <= first <= size - self.length:
            raise ValueError(f"axis {self.axis} of {list(value.shape)} has no room for {self.length} entries")
        last = first + self.length
        before, behind = value.narrow(self.axis, 0, first), value.narrow(self.axis, last, size - last)
        return torch.cat([before, behind], self.axis)

    def between(self, value: Tensor, others: Tensor) -> Tensor:
        """The inverse of :meth:`of` and :meth:`others`: `value` in its place among the others."""
        size = others.shape[self.axis]
        first = self.first(size + self.length)
        before, behind = others.narrow(self.axis, 0, first), others.narrow(self.axis, first, size - first)
        return torch.cat([part for part in (before, value, behind) if part.shape[self.axis]], self.axis)

    def describe(self) -> str:
        """In words."""
        side = "last" if self.from_end else "first"
        text = f"the {side} {self.length} along axis {self.axis}"
        return text + (f" but {self.start}" if self.start else "")


@dataclass(frozen=True)
class Entries:
    """A map from the entries of a source (B, ...) to entries of a target (B, ...): a reordered block, or runs.

    As a block, the entries `taken` of the source are reshaped to `unfold`, their axes permuted, reshaped to `shape`,
    and put at `place` among the target's other entries. As runs, nothing of this is said, and `shape` is the target's.

    Attributes:
        shape: per sample, of the entries as they stand in the target; with `runs`, of the whole target.
        taken: the part of the source that is used; None: all of it.
        unfold: a per-sample shape of the taken part; (): its own.
        permutation: the order of all axes of that, batch included; (): as they are.
        place: where they stand in the target; None: they are all of it.
        runs: (first in the target, first in the source, length) of entries in a row, in both flattened per sample.
    """

    shape: tuple[int, ...]
    taken: Block | None = None
    unfold: tuple[int, ...] = ()
    permutation: tuple[int, ...] = ()
    place: Block | None = None
    runs: tuple[tuple[int, int, int], ...] = ()

    def pick(self, source: Tensor) -> Tensor:
        """The entries (B, *shape) of a source (B, ...); with runs, only those that are in them, flat (B, n)."""
        if self.runs:
            return source.flatten(1)[:, self._runs(1, source.device)]
        value = source if self.taken is None else self.taken.of(source)
        value = value.reshape(len(value), *self.unfold) if self.unfold else value
        value = value.permute(self.permutation) if self.permutation else value
        return value.reshape(len(value), *self.shape)

    def put(self, source: Tensor, rest: Tensor | None) -> Tensor:
        """The target (B, ...) of a source (B, ...), with what :meth:`rest` keeps of it."""
        value = self.pick(source)
        if self.runs and rest is not None:
            flat = rest.to(value.dtype).flatten(1)
            return flat.index_copy(1, self._runs(0, value.device), value).reshape(rest.shape)
        if self.place is None or rest is None:
            return value.reshape(len(value), *self.shape)
        return self.place.between(value, rest.to(value.dtype))

    def rest(self, target: Tensor) -> Tensor | None:
        """What of a target (B, ...) does not come from the source: the others than the block, or with runs all of it.

        Raises:
            ValueError: the target has no room for the block.
        """
        if self.runs:
            whole = math.prod(self.shape)
            if target[:1].numel() != whole:
                raise ValueError(f"its shape is {list(target.shape[1:])}, not {list(self.shape)}")
            if sum(length for _, _, length in self.runs) == whole:
                return None
            flat = target.flatten(1).clone()
            flat[:, self._runs(0, target.device)] = 0
            return flat.reshape(target.shape)
        return None if self.place is None else self.place.others(target)

    def read(self, shape: Sequence[int]) -> Tensor:
        """Which entries of a source of per-sample `shape` are used: bool of that shape."""
        numbers = torch.arange(math.prod(shape)).reshape(1, *shape)
        used = torch.zeros(numbers.numel(), dtype=torch.bool)
        used[self.pick(numbers).flatten()] = True
        return used.reshape(tuple(shape))

    def unread(self, shape: Sequence[int]) -> Tensor | None:
        """Which entries of a source of per-sample `shape` are not used: bool of that shape; None: there are none.

        Whether there are any is said by the map's own numbers: a plan has no tensor whose values could be looked at.
        """
        if self.runs:
            used = {entry for _, first, length in self.runs for entry in range(first, first + length)}
            whole = len(used) == math.prod(shape)
        else:
            whole = self.taken is None or self.taken.length == shape[self.taken.axis - 1]
        return None if whole else ~self.read(shape)

    def describe(self) -> str:
        """In words."""
        if self.runs:
            count = sum(length for _, _, length in self.runs)
            return f"{count} entries in {len(self.runs)} runs of {list(self.shape)}"
        text = "" if self.taken is None else f"{self.taken.describe()} of its own, "
        text += f"{list(self.shape)}"
        return text if self.place is None else f"{text}, {self.place.describe()}"

    def _runs(self, side: int, device: torch.device) -> Tensor:
        return torch.cat([torch.arange(run[side], run[side] + run[2]) for run in self.runs]).to(device)


def entries_from_json(data: dict[str, Any] | None) -> Entries | None:
    """What `dataclasses.asdict` made of entries, read from JSON again."""
    if data is None:
        return None
    taken, place = (None if data[name] is None else Block(**data[name]) for name in ("taken", "place"))
    shape, unfold, permutation = (tuple(data[name]) for name in ("shape", "unfold", "permutation"))
    return Entries(shape, taken, unfold, permutation, place, tuple((a, b, n) for a, b, n in data["runs"]))


def copies(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Tensor:
    """Of each entry of a target the entry of the source that it is a copy of in every run: (n,) int64, -1 for none.

    Args:
        targets: the same tensor in several runs; flattened, n entries.
        sources: the tensor that may have been copied, in the same runs; cast to the target's dtype first.
    """
    own = [source.to(target.dtype).flatten().cpu() for source, target in zip(sources, targets, strict=True)]
    wanted = [target.flatten().cpu() for target in targets]
    keys, order = _digests(own).sort()
    asked = _digests(wanted)
    place = torch.searchsorted(keys, asked).clamp(max=len(keys) - 1)
    found = order[place]
    same = keys[place] == asked
    for source, target in zip(own, wanted, strict=True):
        same &= source[found] == target
    return torch.where(same, found, -1)


def as_entries(index: Tensor, source: Sequence[int], target: Sequence[int]) -> Entries:
    """The map that :func:`copies` found, in its shortest form.

    Args:
        index: (n,) of a target of one sample.
        source: the source's shape without the batch axis.
        target: the target's, likewise.
    """
    block = _as_block(index, tuple(source), tuple(target))
    return _as_runs(index, tuple(target)) if block is None else block


def _as_block(index: Tensor, source: tuple[int, ...], target: tuple[int, ...]) -> Entries | None:
    """The map as one reordered block; None where it is none."""
    placed = _range((index >= 0).reshape(target))
    inner = index[index >= 0]
    used = torch.zeros(math.prod(source), dtype=torch.bool)
    used[inner] = True
    taken = _range(used.reshape(source))
    if placed is None or taken is None or int(used.sum()) != len(inner):
        return None
    place, shape = placed
    part, part_shape = taken
    # The entries' numbers within the part that is taken.
    numbers = torch.cumsum(used, 0)[inner] - 1
    strides = _strides(numbers)
    if strides is None:
        return None
    if len(strides) <= 1:
        return Entries(shape, taken=part, place=place)
    order = sorted(range(len(strides)), key=lambda axis: -strides[axis][1])
    unfold = tuple(strides[axis][0] for axis in order)
    permutation = (0, *(order.index(axis) + 1 for axis in range(len(strides))))
    return Entries(shape, part, () if unfold == part_shape else unfold, permutation, place)


def _as_runs(index: Tensor, target: tuple[int, ...]) -> Entries:
    places = (index >= 0).nonzero().flatten()
    sources = index[places]
    broken = (places.diff() != 1) | (sources.diff() != 1)
    starts = [0, *(broken.nonzero().flatten() + 1).tolist(), len(places)]
    runs = tuple((int(places[a]), int(sources[a]), b - a) for a, b in pairwise(starts))
    return Entries(target, runs=runs)


def _range(mask: Tensor) -> tuple[Block | None, tuple[int, ...]] | None:
    """The block that a mask (one sample, without batch axis) is and its shape; None where it is none."""
    if bool(mask.all()):
        return None, tuple(mask.shape)
    for axis in range(mask.dim()):
        others = [other for other in range(mask.dim()) if other != axis]
        some, every = (mask.sum(others), math.prod(mask.shape[other] for other in others)) if others else (mask, 1)
        full = (some == every).nonzero().flatten()
        if len(full) and int(some.sum()) == every * len(full) and int(full[-1] - full[0]) == len(full) - 1:
            shape = (*mask.shape[:axis], len(full), *mask.shape[axis + 1 :])
            # The last ones are so whatever stands before them: another item may have more references.
            last = int(full[-1]) == mask.shape[axis] - 1
            return Block(axis + 1, 0 if last else int(full[0]), len(full), from_end=last), shape
    return None


def _strides(numbers: Tensor) -> list[tuple[int, int]] | None:
    """Sizes and strides, the slowest first, of a permutation of 0..n-1 that a reordering of axes makes; else None."""
    found: list[tuple[int, int]] = []
    rest = numbers
    while len(rest) > 1:
        step = rest[1] - rest[0]
        steady = (rest.diff() == step).long()
        length = int(steady.cumprod(0).sum()) + 1
        if len(rest) % length or int(step) <= 0:
            return None
        rows = rest.reshape(-1, length)
        if not torch.equal(rows, rows[:, :1] + torch.arange(length) * step):
            return None
        found.insert(0, (length, int(step)))
        rest = rows[:, 0]
    expected = 1
    for size, stride in sorted(found, key=lambda pair: pair[1]):
        if stride != expected:
            return None
        expected *= size
    return found


def _digests(values: Sequence[Tensor]) -> Tensor:
    """One number for each entry of flat tensors of equal shape: the same where all their values are."""
    total = torch.zeros(len(values[0]), dtype=torch.int64)
    for value in values:
        bits = (value.detach().cpu() + 0.0).contiguous().view(_BITS[value.element_size()]).long()
        total = (total ^ bits) * _MIXER
        total = total ^ (total >> 29)
    return total
