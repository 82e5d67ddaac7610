"""Phases of the time: which of the student's steps one expert makes, and where its samples arrive (Phased DMD)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.errors import UserError


@dataclass(frozen=True)
class Phase:
    """One subinterval of the signal-to-noise ratio, walked by one expert.

    Attributes:
        steps: indices of its steps in the student's grid.
        start: time of its first step, the noisiest of the subinterval.
        last: time of its last step.
        anchor: time at which its samples arrive, where the next phase starts; None for clean samples.
        lowest: the lowest time at which its expert is called, halfway between its last step and the anchor; 0 for the
            last phase.
    """

    steps: range
    start: float
    last: float
    anchor: float | None
    lowest: float


def default_lengths(steps: int) -> list[int]:
    """The paper's two phases, of equal size where the number of steps is even; one step is one phase."""
    return [steps] if steps == 1 else [steps - steps // 2, steps // 2]


def make_phases(grid: Sequence[float], lengths: Sequence[int]) -> tuple[Phase, ...]:
    """Cut a student's grid into phases.

    Args:
        grid: times, descending, without the final 0.
        lengths: number of steps of each phase, noisiest first.

    Raises:
        UserError: the phases do not cover the steps one by one.
    """
    if not lengths or any(length < 1 for length in lengths) or sum(lengths) != len(grid):
        raise UserError(
            f"--phases {list(lengths)} do not cover the student's {len(grid)} steps; give the number of steps of each "
            f"phase, noisiest first, such as {default_lengths(len(grid))}"
        )
    phases, first = [], 0
    for length in lengths:
        steps = range(first, first + length)
        first += length
        last = first == len(grid)
        lowest = 0.0 if last else (grid[first - 1] + grid[first]) / 2
        phases.append(Phase(steps, grid[steps.start], grid[first - 1], None if last else grid[first], lowest))
    return tuple(phases)


def describe(phases: Sequence[Phase], schedule: NoiseSchedule) -> str:
    """One line for people: each phase's steps and its subinterval of the SNR, in decibels."""
    parts = []
    for number, phase in enumerate(phases, 1):
        ends = [phase.start] if phase.anchor is None else [phase.start, phase.anchor]
        decibels = schedule.log_snr(torch.tensor(ends, dtype=torch.float64)) * 10 / torch.log(torch.tensor(10.0))
        bounds = " to ".join(f"{value:.1f}" for value in decibels.tolist()) + (
            " dB" if phase.anchor else " dB to clean"
        )
        parts.append(f"phase {number}: {len(phase.steps)} step{'s' * (len(phase.steps) > 1)}, SNR {bounds}")
    return "; ".join(parts)
