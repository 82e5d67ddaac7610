"""DMD2: improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867).

The student's samples are noised; where teacher and critic disagree about what was clean, the student is pushed towards
the teacher. The critic follows the student by ordinary denoising, several updates for each one of the student.

    accelerate launch -m fewstep.trainers.dmd2 --teacher DIR --prompts FILE --steps 4 --out OUT

Departures from the released code: x0 conversions use float64 coefficients on float32 samples instead of float64
samples; flow and EDM teachers get the critic loss of their own output space; data-free unless ``--data`` is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.config import RunConfig
from fewstep.distillation import Distillation, main
from fewstep.errors import UserError
from fewstep.features import FeatureTap
from fewstep.guidance import GuidedDenoiser
from fewstep.losses.adversarial import discriminator_loss, generator_loss
from fewstep.losses.score import denoising_loss, distribution_matching, native_weight
from fewstep.method import Batch, Calls, Turn
from fewstep.prediction import add_noise
from fewstep.roles import Role
from fewstep.rollout import Sampler, rollout
from fewstep.timesteps import shift_time, uniform_times

# The critic and the head learn at all times; a flow network's x0 says nothing about its velocity at t = 0 itself.
_CLEANEST = 1e-3


@dataclass(kw_only=True)
class Dmd2Config(RunConfig):
    """DMD2 (Yin et al. 2024).

    Args:
        critic_lr: learning rate of the critic; default that of the student.
        critic_updates: critic updates for each student update (paper: 5 for SDXL and ImageNet, 10 for SD 1.5).
        time_min: lowest time at which teacher and critic are compared (paper: 0.02).
        time_max: highest time at which teacher and critic are compared (paper: 0.98).
        time_shift: shift of those times for flow teachers; default that of the student's grid.
        normalizer_min: lower bound of the distribution-matching normaliser (paper: none).
        gan_weight: weight of the adversarial term in the student's loss (paper: 1e-3 to 5e-3); needs --data.
        gan_critic_weight: weight of the adversarial term in the critic's loss (paper: 1e-2).
    """

    critic_lr: float | None = None
    critic_updates: int = 5
    time_min: float = 0.02
    time_max: float = 0.98
    time_shift: float | None = None
    normalizer_min: float = 0.0
    gan_weight: float = 0.0
    gan_critic_weight: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_negative("critic_lr", "normalizer_min", "gan_weight", "gan_critic_weight")
        if self.critic_updates < 1:
            raise UserError(f"--critic_updates must be at least 1, not {self.critic_updates}")
        if not 0 < self.time_min < self.time_max <= 1:
            raise UserError(
                f"--time_min and --time_max must satisfy 0 < min < max <= 1, not {self.time_min}, {self.time_max}"
            )
        if self.time_shift is not None and not self.time_shift > 0:
            raise UserError(f"--time_shift must be positive, not {self.time_shift}")
        if self.gan_weight > 0 and self.data is None:
            raise UserError("--gan_weight needs real images: give --data, or leave the GAN out")


class Dmd2:
    """The method; see the module. Roles: student, teacher, critic (which owns the GAN head), and ema if asked for."""

    Config = Dmd2Config

    def __init__(
        self,
        config: Dmd2Config,
        roles: dict[str, Role],
        guided_teacher: GuidedDenoiser,
        sampler: Sampler,
        tap: FeatureTap | None = None,
        shift: float = 1.0,
    ) -> None:
        self.config, self.roles, self.sampler, self.tap, self.shift = config, roles, sampler, tap, shift
        self.schedule = sampler.schedule
        self.student, self.critic, self.teacher = roles["student"], roles["critic"], guided_teacher

    @classmethod
    def prepare(cls, config: Dmd2Config, distillation: Distillation) -> Dmd2:
        """Make the roles: student and critic start as the teacher, or as in --init."""
        roles = distillation.make_roles("student", "critic")
        tap = distillation.add_head(roles["critic"]) if config.gan_weight > 0 else None
        distillation.initialize(roles)
        shift = distillation.shift if config.time_shift is None else config.time_shift
        return cls(config, roles, distillation.guided(roles["teacher"]), distillation.sampler, tap, shift)

    def learning_rate(self, role: str) -> float:
        """Of the student or the critic."""
        critic_lr = self.config.lr if self.config.critic_lr is None else self.config.critic_lr
        return critic_lr if role == "critic" else self.config.lr

    def calls(self, step: int, batch: Batch) -> dict[str, Calls]:
        """What one step costs; the student's own earlier steps count too."""
        earlier = batch.draws.shared_integer("student_step", 0, len(self.sampler.grid))
        if step % self.config.critic_updates:
            calls = {"student": Calls(no_grad=earlier + 1), "critic": Calls(to_parameters=1)}
        else:
            calls = {"student": Calls(no_grad=earlier, to_parameters=1)}
            calls |= {"teacher": Calls(no_grad=self.teacher.calls), "critic": Calls(no_grad=1, to_parameters=1)}
        if self.tap is not None:
            calls["critic/features"] = Calls(to_parameters=2, to_inputs=0 if step % self.config.critic_updates else 1)
        return calls

    def turns(self, step: int, batch: Batch) -> Iterator[Turn]:
        """Every ``critic_updates`` steps the student, and in every step the critic on the same, pre-update sample."""
        # 1. Sample from the student, through its own earlier steps (backward simulation, §4.5).
        last = batch.draws.shared_integer("student_step", 0, len(self.sampler.grid))
        noise = batch.draws.normal("noise", batch.shape)
        student_turn = step % self.config.critic_updates == 0
        with torch.set_grad_enabled(student_turn):
            x0 = rollout(
                self.student,
                self.sampler,
                noise,
                batch.conditioning,
                step_noise=lambda k: batch.draws.normal(f"step_noise_{k}", batch.shape),
                last=last,
            )

        # 2. The student: distribution matching (§3), and the critic's features must look real (§4.3).
        if student_turn:
            gradient, log = self.matching(x0.detach(), batch)
            pieces: list[tuple[Tensor, Tensor | None]] = [(x0, gradient)]
            if self.tap is not None:
                adversarial = generator_loss(self.logits(x0, batch, "student"))
                pieces.append((self.config.gan_weight * adversarial, None))
                log["student/adversarial"] = adversarial.detach()
            yield Turn("student", pieces, log)
            pieces.clear()  # the graph is spent; a generator holds none across a yield
        x0 = x0.detach()

        # 3. The critic: denoise the student's sample at a time of its own (§4.2), and tell real from fake.
        loss, log = self.denoising(x0, batch)
        pieces = [(loss, None)]
        if self.tap is not None:
            fake = self.logits(x0, batch, "fake")
            real = self.logits(batch.real.x0, batch, "real")
            adversarial = discriminator_loss(real, fake)
            pieces.append((self.config.gan_critic_weight * adversarial, None))
            log["critic/adversarial"] = adversarial.detach()
        yield Turn("critic", pieces, log)

    @torch.no_grad()
    def matching(self, x0: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradient of the distribution-matching loss at ``x0`` (B, ...), and what to log."""
        config = self.config
        t = uniform_times(batch.draws.uniform("matching_time"), config.time_min, config.time_max)
        t = self.schedule.snap(shift_time(t, self.shift))
        x_t = add_noise(x0, batch.draws.normal("matching_noise", batch.shape), self.schedule.coefficients(t))
        x0_teacher = self.teacher(x_t, t, batch.conditioning)
        x0_critic = self.critic(x_t, t, batch.conditioning)
        loss, gradient = distribution_matching(x0, x0_teacher, x0_critic, config.normalizer_min)
        log = {"student/matching": loss, "student/gradient": (2 * loss).sqrt()}
        log |= {"student/x0_mean": x0.mean(), "student/x0_std": x0.std()}
        log |= {"student/teacher_mean": x0_teacher.mean(), "student/teacher_std": x0_teacher.std()}
        return gradient, log

    def denoising(self, x0: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's loss () on the student's ``x0`` (B, ...), in the space of its own output, and what to log."""
        t = uniform_times(batch.draws.uniform("critic_time"), _CLEANEST, 1.0)
        t = self.schedule.snap(shift_time(t, self.shift))
        x_t = add_noise(x0, batch.draws.normal("critic_noise", batch.shape), self.schedule.coefficients(t))
        weight = native_weight(self.critic.denoiser.prediction_type, self.schedule, t)
        loss = denoising_loss(x0, self.critic(x_t, t, batch.conditioning), weight)
        log = {"critic/denoising": loss.detach()}
        if batch.logging:
            # How much better than the teacher the critic knows the student: above 1 it lags behind.
            with torch.no_grad():
                teacher = denoising_loss(x0, self.roles["teacher"](x_t, t, batch.conditioning), weight)
            log["critic/lag"] = loss.detach() / teacher
        return loss, log

    def logits(self, x0: Tensor, batch: Batch, name: str) -> Tensor:
        """The critic's head (B,) on noised ``x0``, each use with its own time and noise (diffusion GAN)."""
        conditioning = batch.real.conditioning if name == "real" else batch.conditioning
        t = self.schedule.snap(uniform_times(batch.draws.uniform(f"{name}_time"), _CLEANEST, 1.0))
        noise = batch.draws.normal(f"{name}_noise", batch.shape)
        x_t = add_noise(x0, noise, self.schedule.coefficients(t))
        return self.critic.added["head"](self.critic.denoiser.features(x_t, t, conditioning, self.tap))


if __name__ == "__main__":
    main("dmd2")
