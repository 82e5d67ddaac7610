"""Flash-DMD: each of the student's steps is taught by what it is good for (Tencent 2025, arXiv 2511.20549).

At a noisy step the student's sample is matched with the teacher's distribution, as in DMD2. From there the walk is
finished, its end is noised to a clean step, and what the student makes of that must look real to a discriminator of
pixels; so the two gradients never meet in one call. The critic denoises, and is pulled towards the student after each
update of it (implicit distribution alignment), so that one or two updates of its own are enough.

    accelerate launch -m fewstep.trainers.flash_dmd --teacher DIR --prompts FILE --data IMAGES --steps 4 --out OUT

No code was released and the paper's body could not be read, so that all this is from notes on it. What they do not say
is our reading: the noisier half of the steps is matched, the loss is non-saturating and of weight 1e-3, the critic
keeps 0.97 of itself and learns from the matched samples, and the discriminator from the judged ones.

Departures: the discriminator's heads look through SAM's encoder where ``--feature_extractor`` names one; the stand-in
is the encoder of the teacher's own autoencoder, and for teachers of pixels convolutions with random weights. Real
images come through the autoencoder, too, so that what it loses gives nobody away. Heads see four levels at even depths.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.config.checks import settled
from fewstep.critic.denoising import CLEANEST, critic_denoising
from fewstep.critic.image_judge import ImageJudge
from fewstep.critic.matching import DistributionMatching
from fewstep.data.batch import Batch
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.renoising import Renoiser
from fewstep.diffusion.rollout import Sampler, ask_at, draw_sample, finish
from fewstep.errors import UserError
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.head_role import HeadRole
from fewstep.networks.roles import Role, trained_pairs
from fewstep.trainers._flash_dmd_config import FlashDmdConfig
from fewstep.training.method import Bench, Order, Pull, Turn


class Called(NamedTuple):
    """A call of the student: what it said of ``x_t`` (B, ...) at a ``step`` of its grid, ``x0`` (B, ...)."""

    x_t: Tensor
    x0: Tensor
    step: int


class FlashDmd:
    """The method; see the module. Roles: student, teacher, critic, discriminator (heads alone), ema, as asked for."""

    Config = FlashDmdConfig

    def __init__(
        self,
        config: FlashDmdConfig,
        roles: dict[str, Role],
        guided_teacher: GuidedDenoiser,
        sampler: Sampler,
        judge: ImageJudge | None = None,
        shift: float = 1.0,
    ) -> None:
        config = config.resolved()
        self.config, self.roles, self.sampler, self.judge = config, roles, sampler, judge
        self.student, self.critic, self.teacher = roles["student"], roles["critic"], guided_teacher
        self.matched = settled(config.matched_steps)
        compared = Renoiser(sampler.schedule, config.time_min, config.time_max, shift)
        self.learnt = Renoiser(sampler.schedule, CLEANEST, 1.0, shift)
        self.matching = DistributionMatching(guided_teacher, self.critic, compared, config.normalizer_min)
        if config.critic_follows_student < 1:
            trained_pairs(self.critic, self.student)  # refuses roles that are not alike

    @classmethod
    def prepare(cls, config: FlashDmdConfig, bench: Bench) -> FlashDmd:
        """Make the roles: student and critic start as the teacher, or as in --init."""
        config = config.resolved()
        roles = bench.make_roles("student", "critic")
        judge = None
        if config.gan_weight > 0:
            if len(roles["teacher"].experts) > 1:
                raise UserError("--gan_weight needs a teacher of one network, and this has several; give 0")
            roles["discriminator"] = heads = HeadRole("discriminator", roles["teacher"])
            judge = ImageJudge(heads, bench.add_image_heads(heads, config.feature_extractor), config.gan_loss)
        shift = config.shift_of_times(bench.sampler.schedule, bench.shift)
        return cls(config, roles, bench.guided(roles["teacher"]), bench.sampler, judge, shift)

    def learning_rate(self, role: str) -> float:
        """Of the student, the critic or the discriminator."""
        return self.config.learning_rate(role)

    def turns(self, step: int, batch: Batch) -> Iterator[Turn | Order]:
        """Every ``critic_updates`` steps the student and the discriminator, and in every step the critic."""
        # 1. Sample from the student up to one of its noisy steps.
        student_turn = step % self.config.critic_updates == 0
        with torch.set_grad_enabled(student_turn):
            noisy = self.called(batch)

        # 2. The student: the noisy step matches the teacher's distribution, a clean one makes real pictures of it.
        seen: list[Tensor] = []
        if student_turn:
            gradient, log = self.matching(noisy.x0.detach(), batch, self.sampler.grid[noisy.step])
            pieces: list[tuple[Tensor, Tensor | None]] = [(noisy.x0, gradient)]
            if self.judge is not None:
                levels = self.judge.features(self.refined(noisy, batch))
                adversarial = self.judge.student_loss(levels)
                seen = [level.detach() for level in levels]
                pieces.append((self.config.gan_weight * adversarial, None))
                log["student/adversarial"] = adversarial.detach()
            yield Turn("student", pieces, log)
            pieces.clear()  # the graph is spent; a generator holds none across a yield
            if self.config.critic_follows_student < 1:
                yield Pull("critic", "student", self.config.critic_follows_student)

        # 3. The critic: denoise the noisy step's sample, as it was before the update.
        loss, log = critic_denoising(self.critic, self.roles["teacher"], noisy.x0.detach(), batch, self.learnt)
        yield Turn("critic", [(loss, None)], log)

        # 4. The discriminator: tell the clean step's pictures from real ones.
        if self.judge is not None and seen:
            loss = self.judge.own_loss(seen, batch.real.x0)
            yield Turn("discriminator", [(loss, None)], {"discriminator/adversarial": loss.detach()})

    def called(self, batch: Batch) -> Called:
        """The student's walk up to one of the steps that are matched; only that call may have a gradient."""
        step = batch.draws.shared_integer("student_step", 0, self.matched)
        met: dict[int, Tensor] = {}
        x0 = draw_sample(
            self.student, self.sampler, batch.draws, batch.shape, batch.conditioning, step, on_step=met.__setitem__
        )
        return Called(met[step], x0, step)

    def refined(self, noisy: Called, batch: Batch) -> Tensor:
        """What the student makes (B, ...) at one of its clean steps of the end of this walk, noised afresh up to there.

        The gradient is that of this last call.
        """
        draws, conditioning, sampler = batch.draws, batch.conditioning, self.sampler

        def step_noise(k: int) -> Tensor:
            return draws.normal(f"step_noise_{k}", batch.shape)

        end = finish(self.student, sampler, noisy.x_t, noisy.x0.detach(), noisy.step, conditioning, step_noise)
        step = draws.shared_integer("judged_step", self.matched, len(sampler.grid))
        there = sampler.schedule.coefficients(sampler.times(step, end))
        x_t = add_noise(end, draws.normal("judged_noise", batch.shape), there)
        return ask_at(self.student, sampler, step, x_t, conditioning)


if __name__ == "__main__":
    main("flash_dmd")
