"""Decoupled DMD (arXiv 2511.22677): the match with the teacher, and what guidance adds, looked at in two places."""

from __future__ import annotations

from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.diffusion.intervals import TimedScale
from fewstep.diffusion.renoising import Renoised
from fewstep.errors import UserError
from fewstep.losses.score import Matching, decoupled_matching
from fewstep.networks.guidance import GuidedDenoiser, guide
from fewstep.recording import GuidanceReport


def refuse_unguided(guidance: GuidanceReport, guidance_scale: float | TimedScale) -> None:
    """Raise ``UserError`` where guidance is off: the method trains on what it changes.

    A teacher that answers the same with and without its condition was refused before.
    """
    if guidance.embedded or guidance_scale == 1.0:
        raise UserError(
            "Decoupled DMD trains on the teacher's response to guidance, which is off here; set "
            "--guidance_scale above 1, or take a teacher that was not distilled for guidance"
        )


def decoupled(
    x0: Tensor,
    x0_critic: Tensor,
    teacher: GuidedDenoiser,
    here: Renoised,
    there: Renoised,
    conditioning: AnyConditioning,
    normalizer: str = "guided",
    normalizer_min: float = 0.0,
) -> tuple[Tensor, Matching]:
    """The teacher's x0 (B, ...) without guidance, and the gradient at the student's.

    Args:
        x0: the student's (B, ...).
        x0_critic: the critic's (B, ...), ``here``.
        teacher: under guidance; it is called 4 times a sample, or 3.
        here: where teacher and critic are compared.
        there: where the teacher is asked what guidance adds.
        conditioning: of B samples.
        normalizer: either term is divided by the mean distance of x0 to the ``"guided"`` teacher in its place, or (one
            call less) to the ``"conditional"`` one.
        normalizer_min: lower bound of that.
    """
    scale = teacher.scale_at(there.t, x0)
    pair = teacher.pair(there.x_t, there.t, conditioning)
    if normalizer == "guided":
        x0_teacher, negative = teacher.pair(here.x_t, here.t, conditioning)
        references = guide(x0_teacher, negative, teacher.scale_at(here.t, x0)), guide(*pair, scale)
    else:
        x0_teacher = teacher.denoiser(here.x_t, here.t, conditioning)
        references = x0_teacher, pair[0]
    terms = (x0_teacher, x0_critic), pair
    return x0_teacher, decoupled_matching(x0, *terms, scale, references, normalizer_min)
