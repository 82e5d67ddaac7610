"""What a variant of distribution matching is: a function from the student's sample to the gradient there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.critic.denoising import sample_log
from fewstep.data.batch import Batch
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.renoising import Renoiser
from fewstep.losses.score import distribution_matching

#: The gradient (B, ...) at a student's sample, and what to log.
Matched = tuple[Tensor, dict[str, Tensor]]
#: Of ``x0`` (B, ...), the batch, and the time at which the student was called for that sample.
Matching = Callable[[Tensor, Batch, float], Matched]


def matching_log(loss: Tensor) -> dict[str, Tensor]:
    """The loss () whose gradient a matching is, and the root of the gradient's mean square, for the log."""
    return {"student/matching": loss, "student/gradient": (2 * loss).sqrt()}


@dataclass(frozen=True)
class DistributionMatching:
    """A :data:`Matching` as in DMD2: teacher and critic look at the sample in one place, at a time of its own.

    Attributes:
        teacher: under guidance.
        critic: as it is.
        compared: where they are compared; the draws are ``matching_time`` and ``matching_noise``.
        normalizer_min: lower bound of the normaliser.
    """

    teacher: Denoiser
    critic: Denoiser
    compared: Renoiser
    normalizer_min: float = 0.0

    @torch.no_grad()
    def __call__(self, x0: Tensor, batch: Batch, _called_at: float) -> Matched:
        x_t, t, _ = self.compared(x0, batch.draws, "matching")
        x0_teacher, x0_critic = (role(x_t, t, batch.conditioning) for role in (self.teacher, self.critic))
        loss, gradient = distribution_matching(x0, x0_teacher, x0_critic, self.normalizer_min)
        return gradient, matching_log(loss) | sample_log(x0, x0_teacher)
