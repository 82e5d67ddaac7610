"""Walks of samples of which a pipeline pins a part: fewstep's own walkers put it back where the pipeline does."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.conditioning.outside import pins_of
from fewstep.conditioning.ragged import AnyConditioning
from fewstep.diffusion.prediction import add_noise, noise_from_x0
from fewstep.diffusion.schedule import NoiseSchedule


def pinned_again(
    conditioning: AnyConditioning,
    schedule: NoiseSchedule,
    x_t: Tensor,
    t: Tensor,
    moved: Tensor,
    then: Tensor,
    first: float | None,
) -> Tensor:
    """``moved`` (B, ...) at ``then`` (B,), its pinned entries at alpha' c + sigma' n: c the picture, n the first noise.

    Args:
        conditioning: of the B samples; where nothing is pinned ``moved`` is returned as it is.
        schedule: alpha and sigma.
        x_t: where the step began, (B, ...).
        t: its time (B,).
        moved: where it led.
        then: the time of that.
        first: of a walk's first step: x_t is this times n. Later ones are pinned already, and n is the noise in them.
    """
    pins = pins_of(conditioning)
    if pins is None:
        return moved
    noise = noise_from_x0(pins.value.to(moved), x_t, schedule.coefficients(t)) if first is None else x_t / first
    return pinned_under(noise, conditioning, schedule, moved, then)


def pinned_under(
    noise: Tensor, conditioning: AnyConditioning, schedule: NoiseSchedule, moved: Tensor, then: Tensor
) -> Tensor:
    """As :func:`pinned_again`, of a walk whose first noise is known: ``noise`` (B, ...), unit normal."""
    pins = pins_of(conditioning)
    if pins is None:
        return moved
    return torch.where(pins.where, add_noise(pins.value.to(moved), noise, schedule.coefficients(then)), moved)


def pinned_clean(conditioning: AnyConditioning, x0: Tensor) -> Tensor:
    """Clean samples (B, ...), their pinned entries those of the picture."""
    pins = pins_of(conditioning)
    return x0 if pins is None else torch.where(pins.where, pins.value.to(x0), x0)
