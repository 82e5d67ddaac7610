"""Decoupled DMD (arXiv 2511.22677): the match with the teacher, and what guidance adds, looked at in two places."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.config.run import RunConfig
from fewstep.diffusion.renoising import Renoised
from fewstep.errors import UserError
from fewstep.losses.score import Matching, decoupled_matching
from fewstep.networks.guidance import GuidedDenoiser, guide


@dataclass(kw_only=True)
class DecoupledConfig(RunConfig):
    """Settings of Decoupled DMD.

    Args:
        decoupled: Decoupled DMD's times: none (DMD2), hybrid (the method: what guidance adds is looked at no noisier
            than where the student was called, the match anywhere), full (both anywhere), constrained (neither noisier).
        decoupled_normalizer: what either term is normalised by: the guided teacher, or (one call less) the conditional.
    """

    decoupled: str = "none"
    decoupled_normalizer: str = "guided"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unknown("decoupled", "none", "hybrid", "full", "constrained")
        self._refuse_unknown("decoupled_normalizer", "guided", "conditional")
        if self.decoupled == "none" and self.decoupled_normalizer != "guided":
            raise UserError("--decoupled_normalizer belongs to Decoupled DMD: give --decoupled, or leave it out")


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
