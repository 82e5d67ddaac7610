"""Distribution matching (DMD, DMD2) and the critic's denoising loss, in x0 space."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.prediction import x0_map
from fewstep.schedule import NoiseSchedule


class Matching(NamedTuple):
    """A loss value () for the log, and its gradient with respect to the student's x0 (B, ...)."""

    loss: Tensor
    gradient: Tensor


@torch.no_grad()
def distribution_matching(
    x0: Tensor, x0_teacher: Tensor, x0_critic: Tensor, normalizer_min: float = 0.0, weight: Tensor | None = None
) -> Matching:
    """The DM gradient (Yin et al. 2024, DMD, Eq. 7-8; DMD2, §3): direction g = (x0_critic - x0_teacher) / n.

    n is the mean of |x0 - x0_teacher| over each sample, at least ``normalizer_min``. The loss 0.5 * mean(g^2) has the
    gradient g / numel at x0, which is handed over directly. Where a sample has n = 0 (or anything else that is not
    finite) its gradient is 0. **The value of this loss is not a measure of progress**: it is a normalised gradient.

    Shapes: ``x0``, ``x0_teacher``, ``x0_critic``: (B, ...), any float dtype; computed in float32 or wider.
        ``weight``: (B,) factor on g, optional.
    """
    x0, x0_teacher, x0_critic = (_at_least_float32(x) for x in (x0, x0_teacher, x0_critic))
    dims = tuple(range(1, x0.dim()))
    normalizer = (x0 - x0_teacher).abs().mean(dims, keepdim=True).clamp(min=normalizer_min)
    direction = (x0_critic - x0_teacher) / normalizer
    if weight is not None:
        direction = direction * weight.to(direction.dtype).reshape(-1, *[1] * len(dims))
    direction = torch.nan_to_num(direction, nan=0.0, posinf=0.0, neginf=0.0)
    return Matching(0.5 * direction.square().mean(), direction / direction.numel())


def denoising_loss(x0: Tensor, x0_predicted: Tensor, weight: Tensor) -> Tensor:
    """mean(weight * (x0_predicted - x0)^2): the critic's loss on the student's samples, never with guidance.

    Shapes: ``x0`` (no gradient flows to it), ``x0_predicted``: (B, ...); ``weight``: (B,). Returns ().
    Source: Yin et al. 2024 (DMD2), §3; the weight decides in which space the mean square is taken.
    """
    x0_predicted = _at_least_float32(x0_predicted)
    error = (x0_predicted - x0.detach().to(x0_predicted.dtype)).square().flatten(1).mean(1)
    return (weight.to(error.device, error.dtype) * error).mean()


def native_weight(prediction_type: str, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """The weight (B,) that turns an x0 error into the squared error of the network's own output at ``t`` (B,).

    Epsilon networks get the plain noise error, v and flow networks the velocity error; EDM gets
    sigma^-2 + sigma_data^-2 (Karras et al. 2022, Table 1) by the same rule.
    """
    _, out = x0_map(prediction_type, schedule, t)
    return out**-2


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
