"""Random draws that are functions of (seed, step, global sample index, name) and of nothing else.

Results therefore do not depend on the number of processes or micro-batches, nor on where a run was resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fewstep.sending import known

# Draws that belong to no step of a training: each purpose has a step of its own, so that no two share their numbers.
#: The samples by which a network is observed: where its features are tapped, where it is told a time.
OBSERVATION_STEP = -1
#: The noise of the sample grids, the same in every grid of a run.
PREVIEWS_STEP = -2
#: The noise of noise-sample pairs, which is drawn again wherever they are read.
PAIRS_STEP = -3
#: The samples by which it is tried whether a teacher responds to its condition.
RESPONSE_STEP = -4
#: The noise of the student's samples that are evaluated, the same in every evaluation of a run.
EVALUATION_STEP = -5
#: The noise of the teacher's samples that they are compared with.
REFERENCE_STEP = -6


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded with 8 bytes of BLAKE2b over ``key``."""
    return torch.Generator().manual_seed(_seed_of(key))


def _seed_of(key: tuple[int | str, ...]) -> int:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class Draws:
    """The draws of one (micro-)batch of one step.

    Args:
        seed: of the run.
        step: of the training, or one of the negative steps above.
        indices: the samples' places in the step's global batch.
        device: where draws are put; they are made on the CPU, so that every device sees the same numbers.

    Each draw has a name, unique within a step (asking twice for one name raises ``ValueError``), because two draws of
    one name would be the same numbers.
    """

    def __init__(self, seed: int, step: int, indices: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seed, self.step, self.indices, self.device = seed, step, list(indices), device
        self._names: set[str] = set()

    def _claim(self, name: str) -> None:
        if name in self._names:
            raise ValueError(f"the draw {name!r} was already made in step {self.step}; names are unique within a step")
        self._names.add(name)

    def _generators(self, name: str) -> Iterator[torch.Generator]:
        """For every sample the one to draw from, before the next is asked for: they are one, seeded anew."""
        self._claim(name)
        one = torch.Generator()  # a new one for each sample would take longer than most draws from it
        return (one.manual_seed(_seed_of((self.seed, self.step, index, name))) for index in self.indices)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal float32 (B, *shape)."""
        drawn = torch.stack([torch.randn(tuple(shape), generator=g) for g in self._generators(name)])
        there = drawn.to(self.device, non_blocking=True)
        return there if tuple(shape) else known(there, drawn)  # a few numbers, of which times may be made

    def uniform(self, name: str) -> Tensor:
        """Uniform on [0, 1), float64 (B,)."""
        values = [torch.rand((), generator=g, dtype=torch.float64) for g in self._generators(name)]
        drawn = torch.stack(values)
        return known(drawn.to(self.device, non_blocking=True), drawn)

    def numbers(self, name: str) -> list[float]:
        """Uniform numbers in [0, 1), one for every sample; the host knows them without asking a device."""
        return [float(torch.rand((), generator=g, dtype=torch.float64)) for g in self._generators(name)]

    def integers(self, name: str, low: int, high: int) -> Tensor:
        """Uniform integers from low to high - 1, int64 (B,)."""
        return torch.stack([torch.randint(low, high, (), generator=g) for g in self._generators(name)]).to(
            self.device, non_blocking=True
        )

    def coins(self, name: str, probability: float) -> list[bool]:
        """For every sample whether its draw fell below ``probability``; the host knows without asking a device."""
        return [bool(torch.rand((), generator=g, dtype=torch.float64) < probability) for g in self._generators(name)]

    def shared_integer(self, name: str, low: int, high: int) -> int:
        """One integer from low to high - 1 for every sample of the step, on every process."""
        self._claim(name)
        return int(torch.randint(low, high, (), generator=keyed_generator(self.seed, self.step, "shared", name)))


def keyed_order(seed: int, name: str, count: int, position: int) -> int:
    """The item at ``position`` of an endless stream over ``count`` items, in a new keyed order each epoch."""
    epoch, place = divmod(position, count)
    return int(_permutation(seed, name, count, epoch)[place])


def keyed_turn(seed: int, name: str, counts: Sequence[int], position: int) -> tuple[int, int]:
    """Whose turn it is at ``position`` of an endless stream that groups share by their sizes, and its earlier turns.

    In each epoch, of as many turns as all groups have items, each has as many turns as it has items.

    Args:
        seed: of the run.
        name: of the stream.
        counts: how many items each group has.
        position: in the stream.

    Returns:
        The group's number, and the number of its earlier turns.
    """
    epoch, place = divmod(position, sum(counts))
    order = _permutation(seed, name, sum(counts), epoch)
    ends = torch.tensor(list(counts)).cumsum(0)
    group = int(torch.searchsorted(ends, order[place], right=True))
    before, last = int(ends[group]) - counts[group], int(ends[group])
    earlier = (order[:place] >= before) & (order[:place] < last)
    return group, epoch * counts[group] + int(earlier.sum())


_permutations: dict[tuple[int, str, int], tuple[int, Tensor]] = {}


def _permutation(seed: int, name: str, count: int, epoch: int) -> Tensor:
    # Only the latest epoch of a stream is kept: positions ascend, and a million-item permutation is 8 MB.
    kept = _permutations.get((seed, name, count))
    if kept is None or kept[0] != epoch:
        kept = (epoch, torch.randperm(count, generator=keyed_generator(seed, "order", name, epoch)))
        _permutations[seed, name, count] = kept
    return kept[1]
