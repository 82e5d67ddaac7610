"""Both ends of a step, t and r <= t, at which a network that is told two times learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.draws import Draws
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.diffusion.timesteps import logit_normal_times, shift_time, uniform_times
from fewstep.sending import sent


@dataclass(frozen=True)
class TwoTimes:
    """Draws t and r as flow times, logit-normal ones (Geng et al. 2025, MeanFlow, §4.3), and gives the schedule's own.

    Attributes:
        schedule: of the network; of a table, times are those of its entries.
        low: lowest flow time of t; what is drawn of r below it becomes 0, the clean sample.
        high: highest flow time of both.
        mean: of the normal of which t is the sigmoid.
        std: standard deviation of the same.
        r_mean: mean of that of r; None where two alike are drawn, and t is the larger one.
        r_std: standard deviation of that of r; None for ``std``.
        shift: of both, as in :func:`fewstep.diffusion.timesteps.shift_time`.
        uniform: in the place of the logit-normals, two uniform draws up to this, before the shift (mf-rae).
    """

    schedule: NoiseSchedule
    low: float
    high: float
    mean: float
    std: float
    r_mean: float | None = None
    r_std: float | None = None
    shift: float = 1.0
    uniform: float | None = None

    def draw(self, draws: Draws, apart: Sequence[int]) -> tuple[Tensor, Tensor]:
        """t and r (B,), float64, from the draws ``t`` and ``r``; r is t but in the rows ``apart``."""
        first, second = (shift_time(tau, self.shift) for tau in self._pair(draws))
        if self.r_mean is None:
            first, second = torch.maximum(first, second), torch.minimum(first, second)
        t, r = (self._own(tau.clamp(self.low, self.high)) for tau in (first, second))
        r = torch.where(second < self.low, 0.0, torch.minimum(r, t))
        rows = sent(apart, t.device, torch.int64)
        return t, t.index_copy(0, rows, r.index_select(0, rows))

    def _pair(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """The two draws (B,), neither shifted nor sorted."""
        if self.uniform is not None:
            return uniform_times(draws.uniform("t"), 0.0, self.uniform), uniform_times(
                draws.uniform("r"), 0.0, self.uniform
            )
        mean = self.mean if self.r_mean is None else self.r_mean
        std = self.std if self.r_std is None else self.r_std
        first = logit_normal_times(draws.normal("t", ()), self.mean, self.std)
        return first, logit_normal_times(draws.normal("r", ()), mean, std)

    def _own(self, flow_time: Tensor) -> Tensor:
        """The schedule's own time (B,) of a flow time."""
        return self.schedule.snap(self.schedule.time_from_flow_time(flow_time))
