"""Pairs of neighbouring times on one trajectory, at which a consistency model is compared with itself.

Every discretisation measures time by EDM's noise level, sigma / alpha, because the constants of the methods were found
there; it gives times that the schedule's network knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.diffusion.draws import Draws
from fewstep.diffusion.schedule import EDMSchedule, NoiseSchedule, TableSchedule
from fewstep.diffusion.timesteps import shift_time

# Where a schedule has no least or no largest noise level, EDM's ends stand for them.
_SIGMA_MIN, _SIGMA_MAX = 0.002, 80.0
_PURE_NOISE = 1e6
# Nearer than this, float32 samples at two noise levels differ by little but rounding (ECT's q = 256 from stage 2 on).
_LEAST_GAP = 1e-5
# Times closer than this are one: schedulers keep theirs in float32.
_SAME = 1e-4


@dataclass(frozen=True)
class TimePair:
    """For each of B samples a time and a neighbour below it, all float64 (B,).

    Attributes:
        t: the upper time.
        r: the lower one.
        sigma_t: noise level at t.
        sigma_r: noise level at r; 0 where r is the trajectory's end, below every time that the network knows.
    """

    t: Tensor
    r: Tensor
    sigma_t: Tensor
    sigma_r: Tensor


class Discretization(Protocol):
    """Where a trajectory is looked at; it may change with the step."""

    def draw(self, step: int, draws: Draws) -> TimePair:
        """TimePair for each sample of a step."""
        ...


class SigmaRange:
    """Noise levels of a schedule between its lowest time and ``top``, and the way back to times.

    Args:
        schedule: alpha and sigma.
        top: the time at which the student starts; it stands for every noise level from there on.
    """

    def __init__(self, schedule: NoiseSchedule, top: float = 1.0) -> None:
        self.schedule, self.top = schedule, top
        self.table = schedule.num_train_timesteps if isinstance(schedule, TableSchedule) else None
        self.lowest = 1 / self.table if self.table else 0.0
        least, most = self._raw(torch.tensor([self.lowest, top], dtype=torch.float64)).tolist()
        self.sigma_min = least if least > 0 else _SIGMA_MIN
        self.sigma_max = most if isinstance(schedule, EDMSchedule) else min(most, _SIGMA_MAX)

    def at(self, t: Tensor) -> Tensor:
        """The noise level (B,) at ``t`` (B,); finite at pure noise, too."""
        return self._raw(t).clamp(max=_PURE_NOISE)

    def time(self, sigma: Tensor) -> Tensor:
        """The time (B,) of the noise level ``sigma`` (B,); at and beyond both ends the ends' own, except under EDM."""
        t = self.schedule.time_from_log_snr(-2 * sigma.double().log())
        if isinstance(self.schedule, EDMSchedule):
            return t
        t = torch.where(sigma <= self.sigma_min, self.lowest, t)
        return self.schedule.snap(torch.where(sigma >= self.sigma_max, self.top, t))

    def between(self, sigma_t: Tensor, sigma_r: Tensor) -> TimePair:
        """The interval between two noise levels (B,); of a table at least one entry long, with the entries' levels."""
        t, r = self.time(sigma_t), self.time(sigma_r)
        if self.table:
            below = sigma_r < self.sigma_min * (1 - 1e-9)
            t = t.clamp(min=2 * self.lowest)
            r = torch.where(below, 0.0, torch.minimum(r, t - self.lowest))
            # Pure noise counts as the largest level: weights fall with sigma, and it is where sampling starts.
            sigma_t, least = self.at(t).clamp(max=self.sigma_max), sigma_r
            sigma_r = torch.where(self.at(r) < sigma_t, self.at(r), least)
        return TimePair(t, r, sigma_t, sigma_r)

    def _raw(self, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule.coefficients(t)
        return sigma / alpha


class EvenTimes:
    """Uniformly drawn intervals of an evenly spaced grid of times, the lowest time included (CD, CT, LCM).

    Under EDM an even grid is the Karras ramp, under a table of 1000 with 50 intervals LCM's 0, 19, 39, ..., 999.

    Args:
        levels: of the schedule.
        counts: how many times a grid may have, the lowest included; all grids are worked out once.
        shift: of a flow grid.
        visited: times that belong to the grid in any case: those at which the student is sampled.
        count: which of ``counts`` it is, as a function of the step; default the first.
    """

    def __init__(
        self,
        levels: SigmaRange,
        counts: Sequence[int],
        shift: float = 1.0,
        visited: Sequence[float] = (),
        count: Callable[[int], int] | None = None,
    ) -> None:
        self.levels, self.shift, self.visited = levels, shift, sorted(visited)
        self.count = count or (lambda _step: counts[0])
        self._grids = {n: self._grid(n) for n in counts}

    def times(self, step: int) -> Tensor:
        """The grid of a step: float64 (N,), ascending."""
        return torch.tensor(self._grids[self.count(step)], dtype=torch.float64)

    def draw(self, step: int, draws: Draws) -> TimePair:
        times = self.times(step)
        lower = draws.integers("interval", 0, len(times) - 1)
        return self.neighbours(times.to(lower.device, non_blocking=True), lower)

    def neighbours(self, times: Tensor, lower: Tensor) -> TimePair:
        """The intervals (B,) that begin at the places ``lower`` (B,) of a grid ``times`` (N,)."""
        t, r = times[lower + 1], times[lower]
        return TimePair(t, r, self.levels.at(t), self.levels.at(r))

    def _grid(self, count: int) -> list[float]:
        even = torch.linspace(0, 1, count, dtype=torch.float64)
        placed = self.levels.schedule.snap(self.levels.top * shift_time(even, self.shift)).tolist()
        placed[0] = self.levels.lowest
        apart = [t for t in placed if all(abs(t - other) > _SAME for other in self.visited)]
        return sorted({*apart, *self.visited})


class LogNormalBins:
    """iCT: intervals of a Karras ramp that doubles, drawn by the mass of a log-normal distribution in each.

    Args:
        levels: of the schedule.
        count: the number of noise levels as a function of the step.
        mean: of ln sigma.
        std: of ln sigma.
    """

    def __init__(self, levels: SigmaRange, count: Callable[[int], int], mean: float = -1.1, std: float = 2.0) -> None:
        self.levels, self.count, self.mean, self.std = levels, count, mean, std

    def draw(self, step: int, draws: Draws) -> TimePair:
        uniform = draws.uniform("interval")
        rho = self.levels.schedule.rho if isinstance(self.levels.schedule, EDMSchedule) else 7.0
        sigma = karras_levels(self.count(step), self.levels.sigma_min, self.levels.sigma_max, rho)
        below = lognormal_bins(sigma, self.mean, self.std).cumsum(0)[:-1].to(uniform.device, non_blocking=True)
        lower = torch.searchsorted(below, uniform, right=True)
        sigma = sigma.to(uniform.device, non_blocking=True)
        return self.levels.between(sigma[lower + 1], sigma[lower])


class EasyTimes:
    """ECT: log-normal noise levels without a grid, and a neighbour that comes closer from stage to stage.

    Args:
        levels: of the schedule.
        stage_steps: steps of a stage.
        q: the gap shrinks by this factor with every stage.
        k: see :func:`fewstep.diffusion.discretization.ect_mapping`.
        b: likewise.
        mean: of ln sigma.
        std: of ln sigma.
    """

    def __init__(
        self,
        levels: SigmaRange,
        stage_steps: int,
        q: float = 2.0,
        k: float = 8.0,
        b: float = 1.0,
        mean: float = -1.1,
        std: float = 2.0,
    ) -> None:
        self.levels, self.stage_steps, self.q, self.k, self.b = levels, stage_steps, q, k, b
        self.mean, self.std = mean, std

    def draw(self, step: int, draws: Draws) -> TimePair:
        return self.neighbours(draws.normal("interval", ()), step // self.stage_steps)

    def neighbours(self, normal: Tensor, stage: int) -> TimePair:
        """The intervals (B,) of ``normal`` draws (B,) in a stage."""
        sigma = torch.exp(self.mean + self.std * normal.double())
        if not isinstance(self.levels.schedule, EDMSchedule):
            # Above the lowest time, so that there is a neighbour; at the top, which a student starts from, and no more.
            sigma = sigma.clamp(1.1 * self.levels.sigma_min, self.levels.sigma_max)
        gap = max(ect_gap(stage, self.q), _LEAST_GAP)
        return self.levels.between(sigma, ect_mapping(sigma, gap, self.k, self.b))


def karras_levels(count: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """``count`` noise levels from sigma_min to sigma_max, ascending: float64 (N,) (Karras et al. 2022, Eq. 5)."""
    ramp = torch.linspace(sigma_min ** (1 / rho), sigma_max ** (1 / rho), count, dtype=torch.float64)
    levels = ramp**rho
    levels[0], levels[-1] = sigma_min, sigma_max  # the ends themselves, not but for rounding
    return levels


def lognormal_bins(levels: Tensor, mean: float = -1.1, std: float = 2.0) -> Tensor:
    """iCT's probability (N - 1,) of each interval of ``levels`` (N,), ascending: P(i) of Eq. 10.

    P(i) ~ erf((ln sigma_{i+1} - mean) / (sqrt(2) std)) - erf((ln sigma_i - mean) / (sqrt(2) std)).
    """
    edges = torch.erf((levels.double().log() - mean) / (math.sqrt(2) * std))
    share = edges.diff()
    return share / share.sum()


def doubling_levels(step: int, steps: int, first: int = 10, last: int = 1280) -> int:
    """iCT's number of levels N(k) = min(s0 2^floor(k / K'), s1) + 1 with K' = floor(K / (log2 floor(s1 / s0) + 1)).

    ``step`` is k of K ``steps``, ``first`` s0 and ``last`` s1 (§3.4).
    """
    stage_steps = max(1, int(steps / (math.log2(last // first) + 1)))
    return min(first * 2 ** (step // stage_steps), last) + 1


def progressive_levels(step: int, steps: int, first: int = 2, last: int = 150) -> int:
    """CT's number of levels N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 (App. C)."""
    squared = step / steps * ((last + 1) ** 2 - first**2) + first**2
    return max(1, math.ceil(math.sqrt(squared) - 1)) + 1


def adaptive_decay(step: int, steps: int, first: int = 2, last: int = 150, decay: float = 0.95) -> float:
    """CT's decay of the target network, mu(k) = exp(s0 ln(mu0) / (N(k) - 1)) (App. C)."""
    return math.exp(first * math.log(decay) / (progressive_levels(step, steps, first, last) - 1))


def ect_gap(stage: int, q: float = 2.0) -> float:
    """How far apart ECT's two times are in a stage: q^-(stage + 1), which shrinks to 0."""
    return q ** -(stage + 1)


def ect_mapping(sigma: Tensor, gap: float, k: float = 8.0, b: float = 1.0) -> Tensor:
    """ECT's lower noise level r = max(0, sigma (1 - gap n)), n = 1 + k sigmoid(-b sigma); (B,) both (§3.2).

    With k = 0 the share n is constant. Where r is 0 the target is the clean sample.
    """
    sigma = sigma.double()
    return (sigma * (1 - gap * (1 + k * torch.sigmoid(-b * sigma)))).clamp(min=0)
