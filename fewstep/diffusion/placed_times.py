"""Both ends of a step by AnyFlow's law: the larger and the smaller of two uniforms, tied by the sample's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.draws import Draws
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.diffusion.timesteps import shift_time
from fewstep.sending import sent


class Parts(NamedTuple):
    """Rows of a batch: those with r = t, those with r = 0, and all with r < t, ascending."""

    equal: list[int]
    zero: list[int]
    apart: list[int]


def parts_of(places: Sequence[int], total: int, equal: float, zero: float) -> Parts:
    """Whose two times are tied, by place in the step's whole batch and so the same in every run (arXiv 2605.13724).

    The first round(equal total) places have r = t, the next round(zero total) have r = 0, the others what is drawn.

    Args:
        places: of the rows, each in 0 .. total - 1.
        total: samples in the step, those of all micro-batches and processes.
        equal: share with r = t.
        zero: share with r = 0.
    """
    first = round(equal * total)
    second = first + round(zero * total)
    tied = [row for row, place in enumerate(places) if place < first]
    ends = [row for row, place in enumerate(places) if first <= place < second]
    return Parts(tied, ends, [row for row, place in enumerate(places) if place >= first])


@lru_cache(maxsize=8)
def spread_places(total: int) -> tuple[int, ...]:
    """A place for each index of 0 .. total - 1, such that neighbours lie far apart.

    Then every micro-batch, and every process, has about the same share of each part. It is van der Corput's order: the
    binary digits of the index, mirrored.
    """

    def mirrored(index: int) -> int:
        return int(f"{index:032b}"[::-1], 2)

    places = [0] * total
    for place, index in enumerate(sorted(range(total), key=mirrored)):
        places[index] = place
    return tuple(places)


def time_table(entries: int, shift: float) -> Tensor:
    """The shifted times 1, (K - 1)/K, ..., 0, float64 (K + 1,), on which AnyFlow's weights by time are read."""
    return shift_time(torch.arange(entries, -1, -1, dtype=torch.float64) / entries, shift)


@dataclass(frozen=True)
class PlacedTimes:
    """Draws t and r as flow times, the larger and the smaller of two uniforms, and gives the schedule's own.

    Attributes:
        schedule: of the network; of a table, times are those of its entries.
        low: lowest flow time of t; what is drawn of r below it becomes 0, the clean sample.
        high: highest flow time of both.
        shift: of both, as in :func:`fewstep.diffusion.timesteps.shift_time`.
    """

    schedule: NoiseSchedule
    low: float
    high: float
    shift: float = 1.0

    def draw(self, draws: Draws, parts: Parts) -> tuple[Tensor, Tensor]:
        """t and r (B,), float64, from the draws ``t`` and ``r``."""
        drawn = torch.stack([shift_time(draws.uniform(name), self.shift) for name in ("t", "r")])
        first, second = drawn.max(0).values, drawn.min(0).values
        t, r = (self._own(tau.clamp(self.low, self.high)) for tau in (first, second))
        r = torch.where(second < self.low, 0.0, torch.minimum(r, t))
        equal, zero = (sent(rows, t.device, torch.int64) for rows in (parts.equal, parts.zero))
        return t, r.index_copy(0, equal, t.index_select(0, equal)).index_fill(0, zero, 0.0)

    def _own(self, flow_time: Tensor) -> Tensor:
        """The schedule's own time (B,) of a flow time."""
        return self.schedule.snap(self.schedule.time_from_flow_time(flow_time))
