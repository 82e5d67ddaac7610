"""Settings of methods with a critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fewstep.config.run import RunConfig
from fewstep.diffusion.scales import GuidanceScale
from fewstep.diffusion.schedule import FlowSchedule, NoiseSchedule
from fewstep.errors import UserError


@dataclass(kw_only=True)
class CriticConfig(RunConfig):
    """A run of a method whose critic follows the student.

    Args:
        critic_lr: learning rate of the critic; default that of the student.
        critic_updates: critic updates for each student update (DMD2: 5 for SDXL and ImageNet, 10 for SD 1.5).
    """

    critic_lr: float | None = None
    critic_updates: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_negative("critic_lr")
        self._refuse_below_one("critic_updates")

    def learning_rate(self, role: str) -> float:
        """Of the student or a critic."""
        return self.lr if role == "student" or self.critic_lr is None else self.critic_lr


@dataclass(kw_only=True)
class FollowingCriticConfig(CriticConfig):
    """A run of a method whose critic may also be pulled towards the student (implicit distribution alignment).

    Args:
        critic_follows_student: what the critic keeps of itself when the student has moved, l in C <- l C + (1 - l) S;
            1 is off (SenseFlow, arXiv 2506.00523: near 1; common: 0.97; CDM, after each of its own updates: 0.999).
            Of adapters it is the factors that are mixed, not their products.
    """

    critic_follows_student: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.critic_follows_student <= 1:
            raise UserError(f"--critic_follows_student must be in [0, 1], not {self.critic_follows_student}")


@dataclass(kw_only=True)
class ScoreConfig(CriticConfig):
    """A run of a method that compares critic and teacher on noised samples.

    Args:
        time_min: lowest time at which teacher and critic are compared (DMD2: 0.02).
        time_max: highest time at which teacher and critic are compared (DMD2: 0.98).
        time_shift: shift of those times for flow teachers; default that of the student's grid.
        normalizer_min: lower bound of the distribution-matching normaliser (DMD2: none).
    """

    time_min: float = 0.02
    time_max: float = 0.98
    time_shift: float | None = None
    normalizer_min: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_negative("normalizer_min")
        if not 0 < self.time_min < self.time_max <= 1:
            raise UserError(
                f"--time_min and --time_max must satisfy 0 < min < max <= 1, not {self.time_min}, {self.time_max}"
            )
        self._refuse_not_positive("time_shift")

    def shift_of_times(self, schedule: NoiseSchedule, of_grid: float) -> float:
        """The shift of the times at which teacher and critic are compared; ``of_grid``: that of the student's grid.

        Raises:
            UserError: one is given for a teacher that is no flow.
        """
        if not isinstance(schedule, FlowSchedule):
            self._refuse_set("belongs to flow-matching teachers", "time_shift")
        return of_grid if self.time_shift is None else self.time_shift


@dataclass(kw_only=True)
class AdversarialConfig(RunConfig):
    """Settings of a method whose critic may also be a discriminator.

    Args:
        adversarial: none, diffusion_gan (few-step SiD) or sida; needs --data.
        gan_weight: weight of that term in the student's loss; default the papers', for means 1e-2 and 1e-4.
        gan_critic_weight: weight of that term in the critic's loss; default the papers', 1 and 1 / a sample's elements.
        gan_start_step: the step at which the student's term begins.
    """

    adversarial: str = "none"
    gan_weight: float | None = None
    gan_critic_weight: float | None = None
    gan_start_step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unknown("adversarial", "none", "diffusion_gan", "sida")
        names = ("gan_weight", "gan_critic_weight", "gan_start_step")
        self._refuse_negative(*names)
        if self.adversarial == "none":
            self._refuse_set("belongs to --adversarial diffusion_gan or sida", *names, "data")
        elif self.data is None:
            raise UserError(f"--adversarial {self.adversarial} needs real images: give --data, or leave it out")

    @property
    def couples_samples(self) -> bool:
        """SiDA averages over the batch before the samples' weights come in."""
        return self.adversarial == "sida"


class Kappas(NamedTuple):
    """The scales of the critic in its own loss, of the critic in the student's loss, and of the teacher."""

    critic_training: GuidanceScale
    critic: GuidanceScale
    teacher: GuidanceScale


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

    def kappas(self, guidance_scale: GuidanceScale) -> Kappas:
        """The scales of a run whose teacher would have this one."""
        if self.guidance in FIXED:
            return FIXED[self.guidance]

        def given(own: float | None) -> GuidanceScale:
            return guidance_scale if own is None else own

        return Kappas(given(self.critic_training_guidance), given(self.critic_guidance), guidance_scale)
