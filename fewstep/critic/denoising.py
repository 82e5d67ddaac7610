"""What a critic learns by: to denoise the student's own samples; and the log that shows whether it keeps up."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.renoising import Renoiser
from fewstep.diffusion.schedule import Coefficients
from fewstep.losses.score import denoising_loss, native_weight, subinterval_target
from fewstep.networks.roles import Role

#: A critic learns at all times; a flow network's x0 says nothing about its velocity at t = 0 itself.
CLEANEST = 1e-3


def sample_log(x0: Tensor, x0_teacher: Tensor) -> dict[str, Tensor]:
    """Mean and spread of the student's ``x0`` (B, ...) beside the teacher's: where they part, the student drifts."""
    both = {"x0": x0.detach(), "teacher": x0_teacher.detach()}
    return {f"student/{name}_{what.__name__}": what(x) for name, x in both.items() for what in (torch.mean, torch.std)}


def critic_denoising(
    critic: Role,
    teacher: Role,
    x: Tensor,
    batch: Batch,
    renoiser: Renoiser,
    emphasis: Callable[[Coefficients, Coefficients], Tensor] | None = None,
    in_x0: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's loss () on the student's samples ``x`` (B, ...), and what to log.

    Args:
        critic: trained.
        teacher: asked only in logged steps, for how far the critic lags behind.
        x: clean, or at the renoiser's anchor: then there is no clean sample to predict, and the target is Phased DMD's.
        batch: of this step; the draws are ``critic_time`` and ``critic_noise``.
        renoiser: times at which the critic learns.
        emphasis: a further weight (B,) on the squared error of the critic's output, of the coefficients of ``x`` and of
            the noised sample.
        in_x0: the plain squared error of x0, where it else is that of the critic's own output.
    """
    x_t, t, noise = renoiser(x, batch.draws, "critic")
    at_s, at_t = renoiser.origin(t), renoiser.schedule.coefficients(t)
    target = subinterval_target(x, noise, at_s, at_t).x0
    weight = torch.ones_like(t) if in_x0 else native_weight(critic.denoiser.prediction_type, renoiser.schedule, t)
    if emphasis is not None:
        weight = weight * emphasis(at_s, at_t)
    loss = denoising_loss(target, critic(x_t, t, batch.conditioning), weight)
    log = {"critic/denoising": loss.detach()}
    if batch.logging:
        # How much better than the teacher the critic knows the student: above 1 it lags behind.
        with torch.no_grad():
            log["critic/lag"] = loss.detach() / denoising_loss(target, teacher(x_t, t, batch.conditioning), weight)
    return loss, log
