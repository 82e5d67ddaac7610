"""Guidance of the critic beside the teacher's: long and short guidance, Zero-CFG and Anti-CFG (SiD-LSG; few-step SiD).

Four scales, all in diffusers' convention (1 is off, 0 the negative alone): kappa1 of the critic in its own loss,
kappa2 = kappa3 of the critic in the student's loss, kappa4 of the teacher.
"""

from __future__ import annotations

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.ragged import AnyConditioning, join
from fewstep.diffusion.draws import Draws


def with_dropout(conditioning: AnyConditioning, negative: Conditioning, draws: Draws, share: float) -> AnyConditioning:
    """``conditioning`` of B samples, each replaced by ``negative`` (of one) with probability ``share``."""
    dropped = draws.coins("critic_dropout", share)
    size = conditioning.batch_size
    return join([conditioning, negative]).select([size if d else row for row, d in enumerate(dropped)])
