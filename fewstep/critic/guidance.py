"""Guidance of the critic beside the teacher's: long and short guidance, Zero-CFG and Anti-CFG (SiD-LSG; few-step SiD).

Four scales, all in diffusers' convention (1 is off, 0 the negative alone): kappa1 of the critic in its own loss,
kappa2 = kappa3 of the critic in the student's loss, kappa4 of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.ragged import AnyConditioning, join
from fewstep.config.run import RunConfig
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.intervals import TimedScale
from fewstep.errors import UserError


class Kappas(NamedTuple):
    """The scales of the critic in its own loss, of the critic in the student's loss, and of the teacher."""

    critic_training: float | TimedScale
    critic: float | TimedScale
    teacher: float | TimedScale


#: What --guidance fixes. The published scale of Anti-CFG is unknown to us: -1, at which the critic says 2 neg - pos, is
#: our reading of its negative guidance.
FIXED = {"zero": Kappas(0.0, 0.0, 1.0), "anti": Kappas(-1.0, -1.0, 1.0)}


@dataclass(kw_only=True)
class CriticGuidanceConfig(RunConfig):
    """Settings of a method whose critic is guided.

    Args:
        guidance: long_short; zero (Zero-CFG: no guidance of the teacher, the critic unconditional); anti (Anti-CFG: the
            critic at -1, our reading, the published value is unknown). The paper adds a GAN to the latter two.
        critic_guidance: scale of the critic in the student's loss (kappa2 = kappa3); default --guidance_scale (kappa4).
        critic_training_guidance: scale of the critic in its own loss (kappa1); default --guidance_scale. Long guidance
            sets these two to 1; short guidance sets the other two to 1 and this one below.
        critic_dropout: share of prompts that become the negative in the critic's turn where the critic is guided.
    """

    guidance: str = "long_short"
    critic_guidance: float | None = None
    critic_training_guidance: float | None = None
    critic_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unknown("guidance", "long_short", *FIXED)
        self._refuse_not_finite("critic_guidance", "critic_training_guidance")
        if not 0 <= self.critic_dropout < 1:
            raise UserError(f"--critic_dropout must be in [0, 1), not {self.critic_dropout}")
        if self.guidance in FIXED:
            scales = ("guidance_scale", "critic_guidance", "critic_training_guidance")
            self._refuse_set(f"is fixed by --guidance {self.guidance}", *scales)

    def refuse_guided_critic(self) -> None:
        """Raise ``UserError`` where something but the teacher's own scale asks for guidance."""
        given = ("guidance",) if self.guidance in FIXED else ("critic_guidance", "critic_training_guidance")
        if asked := [f"--{name}" for name in given if getattr(self, name) not in (None, 1.0)]:
            raise UserError(f"this teacher has no negative to guide away from: leave out {' and '.join(asked)}")

    def kappas(self, guidance_scale: float | TimedScale) -> Kappas:
        """The scales of a run whose teacher would have this one."""
        if self.guidance in FIXED:
            return FIXED[self.guidance]
        own = (self.critic_training_guidance, self.critic_guidance)
        return Kappas(*(guidance_scale if k is None else k for k in own), guidance_scale)


def with_dropout(conditioning: AnyConditioning, negative: Conditioning, draws: Draws, share: float) -> AnyConditioning:
    """``conditioning`` of B samples, each replaced by ``negative`` (of one) with probability ``share``."""
    dropped = draws.coins("critic_dropout", share)
    size = conditioning.batch_size
    return join([conditioning, negative]).select([size if d else row for row, d in enumerate(dropped)])
