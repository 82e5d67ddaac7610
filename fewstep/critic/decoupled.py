"""Decoupled DMD (arXiv 2511.22677): the match with the teacher, and what guidance adds, looked at in two places."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.critic.denoising import sample_log
from fewstep.critic.matching import Matched, matching_log
from fewstep.data.batch import Batch
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.renoising import Renoiser
from fewstep.diffusion.scales import GuidanceScale
from fewstep.errors import UserError
from fewstep.losses.score import decoupled_matching
from fewstep.networks.guidance import GuidedDenoiser, guide
from fewstep.recording import GuidanceReport


def refuse_unguided(guidance: GuidanceReport, guidance_scale: GuidanceScale) -> None:
    """Raise ``UserError`` where guidance is off: the method trains on what it changes.

    A teacher that answers the same with and without its condition was refused before.
    """
    if guidance.embedded or guidance_scale == 1.0:
        raise UserError(
            "Decoupled DMD trains on the teacher's response to guidance, which is off here; set "
            "--guidance_scale above 1, or take a teacher that was not distilled for guidance"
        )


@dataclass(frozen=True)
class DecoupledMatching:
    """A :data:`fewstep.critic.matching.Matching`: the match in one place, what guidance adds in another.

    Attributes:
        teacher: under guidance; it is called 4 times a sample, or 3.
        critic: as it is.
        compared: where they are compared.
        times: ``"hybrid"`` (guidance no noisier than where the student was called, the match anywhere), ``"full"``
            (both anywhere), or ``"constrained"`` (neither noisier).
        normalizer: either term is divided by the mean distance of x0 to the ``"guided"`` teacher in its place, or (one
            call less) to the ``"conditional"`` one.
        normalizer_min: lower bound of that.
    """

    teacher: GuidedDenoiser
    critic: Denoiser
    compared: Renoiser
    times: str = "hybrid"
    normalizer: str = "guided"
    normalizer_min: float = 0.0

    @torch.no_grad()
    def __call__(self, x0: Tensor, batch: Batch, called_at: float) -> Matched:
        cleaner, teacher = self.compared.below(called_at), self.teacher
        here = (cleaner if self.times == "constrained" else self.compared)(x0, batch.draws, "matching")
        there = (self.compared if self.times == "full" else cleaner)(x0, batch.draws, "guidance")
        x0_critic = self.critic(here.x_t, here.t, batch.conditioning)
        scale = teacher.scale_at(there.t, x0)
        pair = teacher.pair(there.x_t, there.t, batch.conditioning)
        if self.normalizer == "guided":
            x0_teacher, negative = teacher.pair(here.x_t, here.t, batch.conditioning)
            references = guide(x0_teacher, negative, teacher.scale_at(here.t, x0)), guide(*pair, scale)
        else:
            x0_teacher = teacher.denoiser(here.x_t, here.t, batch.conditioning)
            references = x0_teacher, pair[0]
        terms = (x0_teacher, x0_critic), pair
        loss, gradient = decoupled_matching(x0, *terms, scale, references, self.normalizer_min)
        return gradient, matching_log(loss) | sample_log(x0, x0_teacher)
