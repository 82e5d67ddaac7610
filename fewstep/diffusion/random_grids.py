"""Grids that are drawn anew in every step, so that a student of one time learns at all (CDM, arXiv 2605.06376)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.diffusion.draws import Draws, keyed_generator
from fewstep.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class RandomGrid:
    """The law of a grid: the first time stays, the others are uniform, and so is how many there are.

    Attributes:
        schedule: of the network.
        first: where every walk begins.
        fewest: steps of a grid.
        most: see ``fewest``.
        low: lowest time after the first; the published law is not shifted.
        high: highest one.
    """

    schedule: NoiseSchedule
    first: float
    fewest: int
    most: int
    low: float
    high: float

    def draw(self, draws: Draws) -> tuple[float, ...]:
        """A grid for all samples of the step, on every process; draws ``schedule_steps`` and ``schedule_times``.

        Times of a table are its own, so that such a grid may have fewer steps than were drawn.
        """
        count = draws.shared_integer("schedule_steps", self.fewest, self.most + 1)
        seed = draws.shared_integer("schedule_times", 0, 2**31)
        # On the CPU whatever the device: the host decides by these numbers.
        drawn = torch.rand(count - 1, generator=keyed_generator("schedule", seed), dtype=torch.float64, device="cpu")
        times = self.schedule.snap(self.low + (self.high - self.low) * drawn)
        return self.first, *sorted({t for t in times.tolist() if t < self.first}, reverse=True)
