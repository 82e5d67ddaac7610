"""Guidance of the critic beside the teacher's: long and short guidance, Zero-CFG and Anti-CFG (SiD-LSG; few-step SiD).

Four scales, all in diffusers' convention (1 is off, 0 the negative alone): kappa1 of the critic in its own loss,
kappa2 = kappa3 of the critic in the student's loss, kappa4 of the teacher.
"""

from __future__ import annotations

from fewstep.conditioning.ragged import AnyConditioning, without_condition
from fewstep.diffusion.draws import Draws


def with_dropout(conditioning: AnyConditioning, draws: Draws, share: float) -> AnyConditioning:
    """``conditioning`` of B samples, each replaced by its own last further answer with probability ``share``."""
    return without_condition(conditioning, draws.coins("critic_dropout", share))
