"""Times to train at and grids to sample on, as plain functions of uniform or normal draws.

Times are float64 in [0, 1], 0 = data, 1 = noise. A function takes the draws instead of making them, so that every
random number of a run stays a function of (seed, step, sample, name).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def uniform_times(uniform: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform times on [low, high] from ``uniform`` draws (B,) on [0, 1)."""
    return low + (high - low) * uniform.double()


def logit_normal_times(normal: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """sigmoid(mean + std * n) (Esser et al. 2024, SD3, Eq. 19) from standard ``normal`` draws (B,)."""
    return torch.sigmoid(mean + std * normal.double())


def exponential_times(uniform: Tensor, steepness: float = 4.0) -> Tensor:
    """ln(1 + u (e^a - 1)) / a: times of density a e^(a t) / (e^a - 1), a = ``steepness`` > 0, from ``uniform`` (B,)."""
    return torch.log1p(uniform.double() * math.expm1(steepness)) / steepness


def u_shaped_times(uniform: Tensor, steepness: float = 4.0) -> Tensor:
    """Times dense at both ends (Lee et al. 2024, 2-rectified flow++), from ``uniform`` draws (B,) on [0, 1).

    Density (a / 2) (e^(a t) + e^(a (1 - t))) / (e^a - 1) with a = ``steepness``: one half of the draws are
    :func:`exponential_times`, the other half their mirror images. (The paper prints e^(a t) + e^(-a t), which is not
    symmetric on [0, 1]; its code draws from this density.)
    """
    twice = 2 * uniform.double()
    mirrored = twice >= 1
    rising = exponential_times(twice - mirrored.double(), steepness)
    return torch.where(mirrored, 1 - rising, rising)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """The flow-matching time shift t' = k t / (1 + (k - 1) t) (Esser et al. 2024, Eq. 23), k = ``shift`` > 0."""
    t = t.double()
    return shift * t / (1 + (shift - 1) * t)


def unshift_time(t: Tensor, shift: float) -> Tensor:
    """The inverse of :func:`shift_time`."""
    return shift_time(t, 1 / shift)


def even_grid(steps: int, shift: float = 1.0) -> Tensor:
    """The student grid 1, (N - 1)/N, ..., 1/N, shifted: float64 (N,), descending, without the final 0.

    Raises:
        ValueError: ``steps`` is not positive.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    return shift_time(torch.arange(steps, 0, -1, dtype=torch.float64) / steps, shift)


@dataclass(frozen=True)
class WalkTimes:
    """The times of a flow student's walk that are not an even grid, nor a shifted one (TwinFlow's sampler, after UCGM).

    Attributes:
        first: where it starts, at most 1.
        last: where its last step starts; 0 for even steps down to the clean sample.
        warp: (a, b, c) of 1 - (1 - (1 - u^a)^b)^c in the place of each u = 1 - t; (1, 1, 1) leaves them.
    """

    first: float = 1.0
    last: float = 0.0
    warp: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def even(self) -> bool:
        """Whether they are evenly spaced from pure noise."""
        return self.first == 1 and self.warp == (1.0, 1.0, 1.0)

    def grid(self, steps: int) -> Tensor:
        """The times (N,) at which a walk's steps start: float64, descending, without the final 0."""
        low, (a, b, c) = 1 - self.first, self.warp
        ends = (low, 1 - self.last, steps) if self.last > 0 else (low, 1.0, steps + 1)
        u = torch.linspace(*ends, dtype=torch.float64)[:steps]
        return 1 - (1 - (1 - u**a) ** b) ** c


def descends(grid: Sequence[float]) -> bool:
    """Whether a grid of N times goes from at most 1 to above 0 by steps that a network can tell apart.

    A step shorter than a thousandth of an even one, 0.001/N, does not move the sample: the network would be asked the
    same again. The last step leads to 0. NaN does not descend.
    """
    least = 1e-3 / max(len(grid), 1)
    steps = zip(grid, (*grid[1:], 0.0), strict=True)
    return len(grid) > 0 and grid[0] <= 1 + 1e-6 and all(a - b >= least for a, b in steps)
