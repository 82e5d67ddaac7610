"""Experts: several networks that share a pipeline's loop by time, as Wan 2.2's two do. One is the usual number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fewstep.recording.watch.observation import Stub


@dataclass(frozen=True, eq=False)
class Expert:
    """One network of a pipeline's loop.

    Attributes:
        component: its name in the pipeline.
        network: itself.
        lowest: the lowest scheduler's timestep (a float32 number) at which the pipeline calls it; -inf for the last.
    """

    component: str
    network: nn.Module
    lowest: float


@dataclass(frozen=True)
class Visits:
    """A run that meets every expert: its step count, and the steps in which the networks run (others are stubbed)."""

    count: int
    live: frozenset[int]

    def run_live(self, components: tuple[str, ...]) -> Stub:
        """What stands in for the networks in the other steps: their last answer."""
        return Stub(components, live=self.live)


def expert_at(experts: Sequence[Expert], timestep: float) -> Expert:
    """The expert that the pipeline calls at a scheduler's timestep. It compares float32 numbers, and so does this."""
    number = torch.tensor(timestep, dtype=torch.float64).float().item()
    return next(expert for expert in experts if number >= expert.lowest)


def components_of(experts: Sequence[Expert]) -> tuple[str, ...]:
    """Their names, from noise to data."""
    return tuple(expert.component for expert in experts)
