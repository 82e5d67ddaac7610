"""SiD: score identity distillation, in one step and in several (Zhou et al. 2024, arXiv 2404.04057, and later papers).

The critic follows the student by denoising; the student then lowers the difference between teacher and critic, and the
gradient of that difference flows through both networks. One loss covers the family:

- SiD: one step, alpha 1 or 1.2; an EDM student starts at ``--first_sigma 2.5``.
- SiD-LSG (arXiv 2406.01561): guided teacher and critic; a table's student starts at ``--first_timestep 625``.
- Few-step SiD (arXiv 2505.12674; flow: 2509.25127): the step whose output is judged is drawn, so that one critic and
  one student match the uniform mixture of all steps' outputs; Zero-CFG and Anti-CFG; a GAN on the critic's features.
- SiDA (arXiv 2410.14919): a GAN on the critic's encoder. Neither GAN has parameters of its own.

    accelerate launch -m fewstep.trainers.sid --teacher DIR --prompts FILE --steps 1 --first_timestep 625 --out OUT

Departures from the released code: losses are means, not sums, over a sample; the two turns of a step share their
prompts (not their noise); a gradient that is not finite stops the run instead of becoming 0; features are tapped at the
mid block or at half depth; no augmentation and no learnt variance, which need networks that diffusers lacks.
SiDA's mean over the batch is one over the micro-batch: it alone is not independent of accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.conditioning.ragged import AnyConditioning
from fewstep.critic.denoising import sample_log
from fewstep.critic.discriminator import CriticDiscriminator
from fewstep.critic.guidance import with_dropout
from fewstep.data.batch import Batch
from fewstep.diffusion.noise_levels import NoiseLevels
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.rollout import Sampler, ask_at, draw_sample
from fewstep.diffusion.schedule import EDMSchedule, NoiseSchedule
from fewstep.errors import UserError
from fewstep.losses.score import denoising_loss, native_weight
from fewstep.losses.score_identity import mean_score_identity, score_identity_weight
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import Role
from fewstep.trainers._sid_config import SidConfig
from fewstep.training.distributed import sum_over_processes
from fewstep.training.method import Bench, Turn

# An EDM critic learns at these (Karras et al. 2022, Table 1), any other where it is compared with the teacher.
_EDM_CRITIC = NoiseLevels("log_normal", mean=-1.2, std=1.2)


class Sid:
    """The method; see the module. Roles: student, teacher, critic, and ema if asked for.

    Args:
        config: of the run.
        roles: student, teacher, critic.
        teacher: under kappa4.
        critic: under kappa2 = kappa3.
        critic_in_training: under kappa1.
        sampler: how the student moves.
        discriminator: the critic's features as one; None in a run without.
    """

    Config = SidConfig

    def __init__(
        self,
        config: SidConfig,
        roles: dict[str, Role],
        teacher: GuidedDenoiser,
        critic: GuidedDenoiser,
        critic_in_training: GuidedDenoiser,
        sampler: Sampler,
        discriminator: CriticDiscriminator | None = None,
    ) -> None:
        config = config.resolved()
        self.config, self.roles, self.sampler, self.discriminator = config, roles, sampler, discriminator
        self.teacher, self.critic, self.critic_in_training = teacher, critic, critic_in_training
        # Wherever the critic is guided it has to know the negative, and is told that in the place of some prompts.
        guided = critic.guidance_scale != 1.0 or critic_in_training.guidance_scale != 1.0
        self.drops = guided and config.critic_dropout > 0
        if config.shared_walk and self.drops:
            raise UserError(
                "--shared_walk walks to the prompts of both turns: give --critic_dropout 0, or leave it out"
            )
        self.schedule = sampler.schedule
        self.weighting = config.weighting_for(self.schedule)
        self.normalizer_min = 1e-5 if config.normalizer_min is None else config.normalizer_min
        self.levels = config.levels(self.schedule)
        self.critic_levels = _EDM_CRITIC if isinstance(self.schedule, EDMSchedule) else self.levels

    @classmethod
    def prepare(cls, config: SidConfig, bench: Bench) -> Sid:
        """Make the roles: student and critic start as the teacher, or as in --init."""
        config = config.resolved()
        roles = bench.make_roles("student", "critic")
        teacher, critic = roles["teacher"], roles["critic"]
        kappas = config.kappas(bench.guidance_scale)
        if not bench.further:
            config.refuse_guided_critic()
        guided = bench.guided(teacher, kappas.teacher), bench.guided(critic, kappas.critic)
        in_training = bench.guided(critic, kappas.critic_training)
        discriminator = None
        if config.adversarial != "none":
            discriminator = CriticDiscriminator(config, critic, bench.tap(critic), sum_over_processes)
        return cls(config, roles, *guided, in_training, bench.sampler, discriminator)

    def learning_rate(self, role: str) -> float:
        """Of the student or the critic."""
        return self.config.learning_rate(role)

    def student_moves(self, step: int) -> bool:
        """Whether the student is updated in this step."""
        return step >= self.config.critic_warmup_steps and (step + 1) % self.config.critic_updates == 0

    def judge(self, step: int) -> CriticDiscriminator | None:
        """Who judges the student's sample in its update of this step, if it has one; None before that begins."""
        judge = self.discriminator
        return judge if judge is not None and step >= judge.start_step else None

    def turns(self, step: int, batch: Batch) -> Iterator[Turn]:
        """In every step the critic and every ``critic_updates`` steps the student, each on a sample of its own."""
        # Few-step SiD: the step whose output is matched, one for the whole batch and for both turns.
        last = batch.draws.shared_integer("student_step", 0, len(self.sampler.grid))
        inputs: dict[int, Tensor] = {}
        yield self.critic_turn(batch, last, inputs)
        if self.student_moves(step):
            yield self.student_turn(batch, last, self.judge(step), inputs[last] if self.config.shared_walk else None)

    def critic_turn(self, batch: Batch, last: int, inputs: dict[int, Tensor] | None = None) -> Turn:
        """Denoise the student's sample under kappa1, and tell real from fake at the same noise.

        The student's inputs x_t (B, ...) on the way, by step, are put into ``inputs``.
        """
        conditioning = batch.conditioning
        if self.drops:
            conditioning = with_dropout(conditioning, batch.draws, self.config.critic_dropout)
        with torch.no_grad():
            x0 = self.sample("critic", batch, conditioning, last, inputs)
        t = self.critic_levels.draw(batch.draws, "critic_time", self.schedule)
        noise, coefficients = batch.draws.normal("critic_noise", batch.shape), self.schedule.coefficients(t)
        x_t = add_noise(x0, noise, coefficients)
        weight = critic_weight(self.roles["critic"].denoiser.prediction_type, self.schedule, t)
        loss = denoising_loss(x0, self.critic_in_training(x_t, t, conditioning), weight)
        log = {"critic/denoising": loss.detach()}
        if batch.logging:
            # How much better than the teacher the critic knows the student: above 1 it lags behind.
            with torch.no_grad():
                x0_teacher = self.critic_in_training.of(self.roles["teacher"])(x_t, t, conditioning)
                log["critic/lag"] = log["critic/denoising"] / denoising_loss(x0, x0_teacher, weight)
        if self.discriminator is not None:
            real = add_noise(batch.real.x0, noise, coefficients)
            logits_real = self.discriminator.logits(real, t, batch.real.conditioning)
            logits_fake = self.discriminator.logits(x_t, t, conditioning)
            adversarial = self.discriminator.critic_loss(logits_real, logits_fake, weight)
            loss = loss + self.discriminator.critic_weight(batch.shape) * adversarial
            log["critic/adversarial"] = adversarial.detach()
        return Turn("critic", [(loss, None)], log)

    def student_turn(
        self, batch: Batch, last: int, judge: CriticDiscriminator | None, x_last: Tensor | None = None
    ) -> Turn:
        """Lower the difference of teacher and critic at the student's sample noised anew; look real to the ``judge``.

        The gradient passes through teacher and critic to the sample; the turn is the student's, so their parameters get
        none. ``x_last`` (B, ...): what the student is asked about at its step ``last``, where it did not walk there.
        """
        if x_last is None:
            x0 = self.sample("student", batch, batch.conditioning, last)
        else:
            x0 = ask_at(self.roles["student"], self.sampler, last, x_last, batch.conditioning)
        t = self.levels.draw(batch.draws, "student_time", self.schedule)
        coefficients = self.schedule.coefficients(t)
        x_t = add_noise(x0, batch.draws.normal("student_noise", batch.shape), coefficients)
        x0_teacher = self.teacher(x_t, t, batch.conditioning)
        x0_critic = self.critic(x_t, t, batch.conditioning)
        weight = score_identity_weight(self.weighting, x0, x0_teacher, coefficients, self.normalizer_min)
        loss = mean_score_identity(x0, x0_teacher, x0_critic, self.config.alpha, weight).mean()
        log = {"student/identity": loss.detach(), "student/weight": weight.mean()}
        log["student/difference"] = (x0_teacher - x0_critic).detach().abs().mean()
        log |= sample_log(x0, x0_teacher)
        if judge is not None:
            adversarial = judge.student_loss(judge.logits(x_t, t, batch.conditioning), weight)
            loss = loss + judge.student_weight * adversarial
            log["student/adversarial"] = adversarial.detach()
        return Turn("student", [(loss, None)], log)

    def sample(
        self,
        name: str,
        batch: Batch,
        conditioning: AnyConditioning,
        last: int,
        inputs: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """The student's x0 (B, ...) at step ``last`` of its own walk, with gradient through its last call at most."""
        walk = (self.roles["student"], self.sampler, batch.draws, batch.shape, conditioning, last)
        return draw_sample(*walk, prefix=f"{name}_walk_", on_step=None if inputs is None else inputs.__setitem__)


def critic_weight(prediction_type: str, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """The weight (B,) of an x0 error in the critic's loss: the network's own error, of v networks that of the noise."""
    return native_weight("epsilon" if prediction_type == "v_prediction" else prediction_type, schedule, t)


if __name__ == "__main__":
    main("sid")
