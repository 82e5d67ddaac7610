"""Time cut into intervals, for what changes with the time: which network is called, how strongly it is guided."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.prediction import expand
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.sending import sent


@dataclass(frozen=True)
class TimeIntervals:
    """[0, 1] in pieces, from noise to data; each reaches from its lowest time up to the one before.

    Attributes:
        schedule: whose timesteps decide.
        lowest: the lowest time of each interval, descending; the last is 0.

    Raises:
        ValueError: the times do not descend to 0.
    """

    schedule: NoiseSchedule
    lowest: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.lowest or self.lowest[-1] != 0 or any(b >= a for a, b in zip(self.lowest, self.lowest[1:])):
            raise ValueError(f"the lowest times of intervals descend to 0, not {self.lowest}")

    def index(self, t: Tensor) -> Tensor:
        """Which interval each time of ``t`` (B,) lies in: int64 (B,).

        Pipelines compare their scheduler's timesteps, float32 numbers. So a time is compared as that number, and a time
        that was read off such a timestep lies where the pipeline puts it, also on a bound.
        """
        bounds = torch.tensor(self.lowest[:-1], dtype=torch.float64)
        timestep = self.schedule.timestep(t).float()
        index = torch.zeros(t.shape, dtype=torch.int64, device=t.device)
        for bound in self.schedule.timestep(bounds).float().tolist():
            index += timestep < bound
        return index


@dataclass(frozen=True)
class TimedScale:
    """A guidance scale of its own for each interval.

    Attributes:
        intervals: of the time.
        scales: w in each.
    """

    intervals: TimeIntervals
    scales: tuple[float, ...]

    def at(self, t: Tensor, like: Tensor) -> Tensor:
        """The scale of each sample at its ``t`` (B,), shaped and typed to multiply ``like`` (B, ...)."""
        scales = sent(self.scales, t.device, torch.float64)
        return expand(scales[self.intervals.index(t)], like)
