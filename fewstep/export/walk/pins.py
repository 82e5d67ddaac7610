"""What a stock pipeline pins of its sample between two steps, as the check of a walk holds it against the picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.conditioning.outside import pins_of
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.schedule import Coefficients, NoiseSchedule
from fewstep.export.walk.demand import TOLERANCE, demand, x_t_of
from fewstep.export.walk.trace import TracedStep
from fewstep.recording.recorded import Recorded


@dataclass(frozen=True)
class Pinned:
    """Entries of one sample that a pipeline puts back to its picture's.

    Attributes:
        where: which, bool (1, *sample_shape).
        value: what they are when they are clean, (1, *sample_shape), float64 on the CPU.
        noised: whether they are noised with the walk's first noise; else they stay the picture's.
    """

    where: Tensor
    value: Tensor
    noised: bool

    @classmethod
    def of(cls, recording: Recorded) -> Pinned | None:
        """What is pinned of the recorded item's sample; None where nothing is."""
        if recording.between is None or recording.between.noised is None:
            return None
        pins = pins_of(recording.condition(items=[recording.invocation.item]))
        noised = recording.between.noised
        return None if pins is None else cls(pins.where.cpu(), pins.value.double().cpu(), noised)

    @property
    def kept(self) -> Tensor | None:
        """Which entries of the first sample are the picture's already; None: none are."""
        return None if self.noised else self.where

    def off(self, x_t: Tensor, noise: Tensor, there: Coefficients) -> Tensor:
        """How far the pinned entries of x_t (1, ...) are from where they should be, and 0 for the others.

        Args:
            x_t: at a step after the first.
            noise: the first, of unit size.
            there: alpha and sigma of the step.
        """
        expected = add_noise(self.value, noise, there) if self.noised else self.value
        return (x_t - expected).where(self.where, torch.zeros_like(x_t))


def check_pins(
    name: str,
    steps: list[TracedStep],
    times: list[Tensor],
    schedule: NoiseSchedule,
    pinned: Pinned,
    noise: Tensor,
) -> list[float]:
    """What the pipeline puts back between steps, against the picture under the first ``noise`` (1, ...)."""
    deviations = []
    for step, t in zip(steps[1:], times[1:], strict=True):
        there = schedule.coefficients(t)
        off = pinned.off(x_t_of(schedule, step.network_input, t), noise, there)
        tolerance = 10 * TOLERANCE[step.sample.dtype] * max(1.0, float(there.sigma[0]))
        text = f"{name}: at timestep {step.timestep:g} what it pins is not the picture that training pins"
        deviations.append(demand(off, torch.zeros_like(off), tolerance, text))
    return deviations
