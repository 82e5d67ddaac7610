"""Distribution matching beside the student's own trajectory (continuous-time distribution matching, arXiv 2605.06376).

A student that is judged on its own walk alone learns nothing about the times between its steps. Here it is asked once
more, at a time of its own choice near that walk, and what it says there is matched as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.critic.matching import Matched
from fewstep.data.batch import Batch
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.pinned import pinned_again
from fewstep.diffusion.prediction import add_noise, ode_step
from fewstep.diffusion.renoising import Renoised, Renoiser
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.losses.score import Matching, distribution_matching

#: Where the student is asked once more.
PLACES = ("extrapolated", "point", "renoised")


@dataclass(frozen=True)
class Walked:
    """A point of the student's walk: ``x_t`` (B, ...) at ``t`` (B,), and what it said there, ``x0`` (B, ...).

    ``first``: where the walk begins, what unit noise was multiplied with; None elsewhere.
    """

    x_t: Tensor
    t: Tensor
    x0: Tensor
    first: float | None = None


def place(walked: Walked, schedule: NoiseSchedule, where: str, t: Tensor, noise: Tensor | None) -> Tensor:
    """The sample (B, ...) at ``t`` (B,) at which the student is asked once more.

    Args:
        walked: the point of its walk, without gradient.
        schedule: alpha and sigma.
        where: one of :data:`PLACES`: ``"extrapolated"`` (the point, moved straight along the velocity that it has; off
            the ODE where that bends), ``"point"`` (the point itself; ``t`` is its own), or ``"renoised"`` (x0 with
            ``noise``).
        t: its time.
        noise: unit normal (B, ...), for ``"renoised"``.

    Source: CDM's released code, for flows; x0 and the implied noise, kept, are the same line in every family.
    """
    if where == "point":
        return walked.x_t
    there = schedule.coefficients(t)
    if where == "renoised":
        assert noise is not None  # as it is wanted here
        return add_noise(walked.x0, noise, there)
    return ode_step(walked.x_t, walked.x0, schedule.coefficients(walked.t), there)


@torch.no_grad()
def unguided_matching(
    x0: Tensor,
    here: Renoised,
    teacher: Denoiser,
    critic: Denoiser,
    conditioning: AnyConditioning,
    normalizer_min: float,
    normalizer_eps: float = 0.0,
) -> Matching:
    """Distribution matching (its loss () and gradient (B, ...)) at ``x0`` (B, ...), which was noised to ``here``."""
    x0_teacher, x0_critic = (one(here.x_t, here.t, conditioning) for one in (teacher, critic))
    return distribution_matching(x0, x0_teacher, x0_critic, normalizer_min, normalizer_eps=normalizer_eps)


@dataclass(frozen=True)
class OffTrajectory:
    """The further term of the student's turn.

    Attributes:
        student: asked once more, with gradient.
        teacher: as the term wants it: guided, or where guidance has a term of its own, not.
        critic: as it is.
        compared: where those two look, and at which times the student is asked.
        where: one of :data:`PLACES`.
        teacher_time: ``"independent"``, or ``"student"``: where the student was asked.
        normalizer_min: of the matching.
    """

    student: Denoiser
    teacher: Denoiser
    critic: Denoiser
    compared: Renoiser
    where: str
    teacher_time: str
    normalizer_min: float

    def __call__(self, walked: Walked, batch: Batch) -> tuple[Tensor, Matched]:
        """What the student says (B, ...), with gradient, and the gradient there with what to log."""
        draws, schedule = batch.draws, self.compared.schedule
        t = walked.t if self.where == "point" else self.compared.times(draws, "off_trajectory")
        noise = draws.normal("off_trajectory_start_noise", batch.shape) if self.where == "renoised" else None
        x = place(walked, schedule, self.where, t, noise)
        if self.where != "point":
            x = pinned_again(batch.conditioning, schedule, walked.x_t, walked.t, x, t, walked.first)
        x0 = self.student(x, t, batch.conditioning)
        if self.teacher_time == "student":
            fresh = draws.normal("off_trajectory_matching_noise", batch.shape)
            here = Renoised(add_noise(x0.detach(), fresh, schedule.coefficients(t)), t, fresh)
        else:
            here = self.compared(x0.detach(), draws, "off_trajectory_matching")
        looked = self.teacher, self.critic, batch.conditioning
        loss, gradient = unguided_matching(x0.detach(), here, *looked, self.normalizer_min)
        return x0, (gradient, {"student/off_trajectory": loss})
