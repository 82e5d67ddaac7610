"""Segments of the time, whose ends no jump of a trajectory crosses: TSCD's, the phases of PCM, PeRFlow's windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.discretization import EvenTimes, TimePair
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.schedule import NoiseSchedule, TableSchedule
from fewstep.errors import UserError
from fewstep.sending import sent

# An end that rounding moved is the end itself.
_SAME = 1e-9


@dataclass(frozen=True)
class Segments:
    """Time cut into pieces that touch; a time that is an end belongs to the piece below it.

    Attributes:
        edges: ends of the pieces in t, ascending; the first is the lowest time, the last the highest.

    Raises:
        ValueError: they do not ascend, or are fewer than two.
    """

    edges: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.edges) < 2 or any(b <= a for a, b in zip(self.edges, self.edges[1:])):
            raise ValueError(f"the edges of segments ascend, and are at least two, not {self.edges}")

    def __len__(self) -> int:
        return len(self.edges) - 1

    def index(self, t: Tensor) -> Tensor:
        """Which piece each time of ``t`` (B,) lies in, 0 the cleanest: int64 (B,). The lowest edge is in piece 0."""
        inner = sent(self.edges[1:-1], t.device, torch.float64)
        return (t.double()[:, None] > inner + _SAME).sum(1)

    def lower(self, t: Tensor) -> Tensor:
        """The lower end (B,), float64, of the piece that each ``t`` (B,) lies in."""
        return sent(self.edges, t.device, torch.float64)[self.index(t)]

    def upper(self, t: Tensor) -> Tensor:
        """The upper end (B,), float64, of the piece that each ``t`` (B,) lies in."""
        return sent(self.edges, t.device, torch.float64)[self.index(t) + 1]

    def snapped(self, times: Sequence[float]) -> Segments:
        """The same pieces with each end moved to the nearest of ``times``."""
        return Segments(tuple(min(times, key=lambda time: abs(time - edge)) for edge in self.edges))


def cut(times: Sequence[float], count: int, *, evenly: bool = True) -> Segments:
    """Cut a grid of N + 1 times, ascending, into ``count`` pieces with edges on the grid: number j N // count of it.

    This is PCM's cut by index (Wang et al. 2024, arXiv 2405.18407, released code): no step of the grid crosses an edge,
    which a cut into equal lengths of time does not give (TSCD's segments of 125 timesteps on a grid of 20).

    Args:
        times: of the grid.
        count: how many pieces.
        evenly: refuse a grid whose N steps ``count`` does not divide; else the pieces differ by one step.

    Raises:
        UserError: more pieces than steps, or such a grid.
    """
    steps = len(times) - 1
    if count > steps:
        raise UserError(f"{count} segments are more than the {steps} intervals of the grid; give fewer segments")
    if evenly and steps % count:
        nearest = max(count, round(steps / count) * count)
        raise UserError(f"{steps} intervals cannot be divided into {count} segments; take {nearest} intervals")
    return Segments(tuple(times[j * steps // count] for j in range(count + 1)))


def draw_between(schedule: NoiseSchedule, low: Tensor, high: Tensor, draws: Draws, name: str) -> Tensor:
    """A uniform time (B,), float64, from ``low`` to ``high`` (B,); of a table an entry, ends included."""
    uniform, low, high = draws.uniform(name), low.double(), high.double()
    if not isinstance(schedule, TableSchedule):
        return low + uniform * (high - low)
    count = schedule.num_train_timesteps
    # Whole numbers, so that neither end is drawn half as often as what lies between.
    first, last = (low * count).round(), (high * count).round()
    return (first + (uniform * (last - first + 1)).floor()) / count


@dataclass(frozen=True)
class Stage:
    """A part of a training in which jumps stay inside of one set of segments.

    Attributes:
        grid: of neighbouring times.
        segments: that its jumps do not leave, with edges on the grid.
        to_edge: jumps end at the lower edge of their segment, else anywhere between that and the neighbour.
    """

    grid: EvenTimes
    segments: Segments
    to_edge: bool

    def end(self, schedule: NoiseSchedule, pair: TimePair, draws: Draws) -> Tensor:
        """Where the jumps from a pair's times end: float64 (B,), at or below its lower time."""
        edge = self.segments.lower(pair.t)
        return edge if self.to_edge else draw_between(schedule, edge, pair.r, draws, "end")

    def span(self, end: Tensor) -> Tensor:
        """The length (B,), float64, of the segment above each ``end`` (B,)."""
        above = end + 1e-6
        return self.segments.upper(above) - self.segments.lower(above)
