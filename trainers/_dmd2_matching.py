"""Which gradient a DMD2 run's student follows: DMD's, f-distill's, SwiftBrush's or Decoupled DMD's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.critic.decoupled import DecoupledMatching
from fewstep.critic.denoising import sample_log
from fewstep.critic.matching import Matched, Matching, matching_log
from fewstep.data.batch import Batch
from fewstep.diffusion.renoising import Renoised, Renoiser
from fewstep.losses.divergence import DivergenceWeight
from fewstep.losses.score import distribution_matching, score_distillation
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import Role
from fewstep.trainers._dmd2_config import Dmd2Config
from fewstep.training.distributed import sum_over_processes

#: What the GAN head (B,) says of noised samples.
Logits = Callable[[Renoised, Batch], Tensor]
#: The guidance (B,) of teacher and critic in SwiftBrush's gradient, None for the run's.
DrawnGuidance = Callable[[Batch], Tensor | None]


@dataclass(frozen=True)
class DensityMatching:
    """DMD's gradient, weighted by f-distill's density ratio where the critic owns one.

    Attributes:
        teacher: under guidance.
        critic: as it is.
        compared: where they are compared.
        logits: of the critic's head.
        normalizer: what the gradient is divided by: the teacher's distance to ``"x0"``, or to ``"x_t"``.
        normalizer_min: lower bound of that.
    """

    teacher: GuidedDenoiser
    critic: Role
    compared: Renoiser
    logits: Logits
    normalizer: str = "x0"
    normalizer_min: float = 0.0

    @torch.no_grad()
    def __call__(self, x0: Tensor, batch: Batch, _called_at: float) -> Matched:
        here = self.compared(x0, batch.draws, "matching")
        x0_critic, x0_teacher = (role(here.x_t, here.t, batch.conditioning) for role in (self.critic, self.teacher))
        weight = None
        if "divergence" in self.critic.added:
            weight = self.critic.added["divergence"](self.logits(here, batch), here.t, sum_over_processes)
        compared = x0 if self.normalizer == "x0" else here.x_t
        loss, gradient = distribution_matching(compared, x0_teacher, x0_critic, self.normalizer_min, weight)
        return gradient, matching_log(loss) | sample_log(x0, x0_teacher)


@dataclass(frozen=True)
class ScoreDistillation:
    """SwiftBrush's gradient: not normalised, and the critic is guided as the teacher is.

    Attributes:
        teacher: under guidance.
        critic: under guidance.
        compared: where they are compared.
        guidance: of both.
    """

    teacher: GuidedDenoiser
    critic: GuidedDenoiser
    compared: Renoiser
    guidance: DrawnGuidance

    @torch.no_grad()
    def __call__(self, x0: Tensor, batch: Batch, _called_at: float) -> Matched:
        here, scale = self.compared(x0, batch.draws, "matching"), self.guidance(batch)
        x0_critic, x0_teacher = (
            role(here.x_t, here.t, batch.conditioning, guidance_scale=scale) for role in (self.critic, self.teacher)
        )
        alpha, sigma = self.compared.schedule.coefficients(here.t)
        loss, gradient = score_distillation(x0_teacher, x0_critic, alpha * sigma)
        return gradient, matching_log(loss) | sample_log(x0, x0_teacher)


def chosen_matching(
    config: Dmd2Config,
    teacher: GuidedDenoiser,
    critic: Role,
    compared: Renoiser,
    logits: Logits,
    guidance: DrawnGuidance,
) -> Matching:
    """The run's. f-distill's density ratio becomes the critic's own, unless it has one already.

    Args:
        config: of the run.
        teacher: under guidance.
        critic: as it is.
        compared: where they are compared.
        logits: of the critic's head.
        guidance: of both in SwiftBrush's gradient.
    """
    if config.swiftbrush:
        return ScoreDistillation(teacher, teacher.of(critic), compared, guidance)
    if config.decoupled != "none":
        how = config.decoupled, config.decoupled_normalizer, config.normalizer_min
        return DecoupledMatching(teacher, critic, compared, *how)
    if config.f_divergence != "none" and "divergence" not in critic.added:
        low, high = compared.ends
        weight = DivergenceWeight(config.f_divergence, config.f_bins, config.f_momentum, t_min=low, t_max=high)
        critic.add("divergence", weight.to(critic.parameters()[0].device))
    return DensityMatching(teacher, critic, compared, logits, config.normalizer, config.normalizer_min)
