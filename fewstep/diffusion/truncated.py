"""Noise levels above a transition alone, at which a truncated consistency model is trained (TCM, arXiv 2410.14895)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.diffusion.discretization import SigmaRange, TimePair, ect_mapping
from fewstep.diffusion.draws import Draws
from fewstep.errors import UserError
from fewstep.sending import sent

# How far above the transition its samples are: it has to be told from below.
_OFFSET = 1e-8
# Numbers by which the law of the noise levels is inverted.
_KNOTS = 4096


@dataclass(frozen=True)
class TruncatedTimes:
    """Pairs of times of which the upper one, and but for samples at the transition the lower one too, is above it.

    Attributes:
        levels: of the schedule.
        transition: noise level.
        gap: as in :func:`fewstep.diffusion.discretization.ect_mapping`, as ``k`` and ``b``.
        k: see gap.
        b: see gap.
        share: of samples at the transition.
        mean: of the logarithm of the noise levels, before it is truncated.
        std: its scale.
        freedom: degrees of freedom of its Student-t law (TCM: 0.01, which has very heavy tails).
    """

    levels: SigmaRange
    transition: float
    gap: float = 1e-3
    k: float = 8.0
    b: float = 1.0
    share: float = 0.25
    mean: float = 0.0
    std: float = 0.2
    freedom: float = 0.01

    def __post_init__(self) -> None:
        if self.levels.table:
            second = float(self.levels.at(torch.tensor(2 / self.levels.table, dtype=torch.float64)))
            if self.transition < second:
                raise UserError(f"--transition must be at least {second:.4g}, the second noise level of the table")
        if not self.lowest < self.levels.sigma_max:
            raise UserError(
                f"--transition {self.transition:g} with --gap {self.gap:g} leaves no noise levels to train at, up to "
                f"{self.levels.sigma_max:.4g}; give smaller ones"
            )

    @cached_property
    def lowest(self) -> float:
        """The noise level whose neighbour is the transition itself; infinite where there is none."""
        low, high = torch.tensor(self.transition, dtype=torch.float64), torch.tensor(1e6, dtype=torch.float64)
        if float(self._neighbour(high)) < self.transition:
            return math.inf
        for _ in range(100):
            middle = (low + high) / 2
            below = bool(self._neighbour(middle) < self.transition)
            low, high = (middle, high) if below else (low, middle)
        return float(high)

    def boundary(self, indices: Sequence[int]) -> list[int]:
        """Which rows of a batch are at the transition; ``indices``: their places among the samples of the step.

        They are spread evenly over these, so that every micro-batch has its share of them.
        """
        return [row for row, i in enumerate(indices) if math.floor((i + 1) * self.share) > math.floor(i * self.share)]

    def draw(self, draws: Draws) -> tuple[TimePair, list[int]]:
        """Times of every sample of a step, and the rows of those at the transition."""
        rows, uniform = self.boundary(draws.indices), draws.uniform("level")
        sigma = self.noise_levels(uniform)
        sigma = sigma.index_fill(0, sent(rows, sigma.device, torch.int64), self.transition * (1 + _OFFSET))
        return self.levels.between(sigma, self._neighbour(sigma)), rows

    def noise_levels(self, uniform: Tensor) -> Tensor:
        """Noise levels (B,), float64, of uniform draws (B,): ln sigma is Student-t, truncated to what is trained."""
        ends = math.log(self.lowest), math.log(self.levels.sigma_max)
        knots = torch.linspace(*ends, _KNOTS, dtype=torch.float64, device=uniform.device)
        density = (1 + ((knots - self.mean) / self.std) ** 2 / self.freedom) ** (-(self.freedom + 1) / 2)
        mass = torch.cumulative_trapezoid(density)
        mass = torch.cat([torch.zeros_like(mass[:1]), mass / mass[-1]])
        right = torch.searchsorted(mass, uniform).clamp(1, _KNOTS - 1)
        share = (uniform - mass[right - 1]) / (mass[right] - mass[right - 1]).clamp(min=1e-300)
        return torch.lerp(knots[right - 1], knots[right], share.clamp(0, 1)).exp()

    def _neighbour(self, sigma: Tensor) -> Tensor:
        return ect_mapping(sigma, self.gap, self.k, self.b)
