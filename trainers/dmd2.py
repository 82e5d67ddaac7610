"""DMD2: improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867).

The student's samples are noised; where teacher and critic disagree about what was clean, the student is pushed towards
the teacher. The critic follows the student by ordinary denoising, several updates for each one of the student.

    accelerate launch -m fewstep.trainers.dmd2 --teacher DIR --prompts FILE --steps 4 --out OUT

Methods that differ in the gradient alone are options: ``--decoupled`` (Decoupled DMD, arXiv 2511.22677: what guidance
adds is looked at elsewhere), ``--f_divergence`` (f-distill, arXiv 2502.15681: the GAN head weighs the samples) and
``--swiftbrush`` (SwiftBrush, arXiv 2312.05239: no normaliser, and the critic is guided too). With
``--critic_follows_student`` the critic is pulled towards the student (SenseFlow's implicit distribution alignment,
arXiv 2506.00523), so that it needs fewer updates. ``--reward`` adds a reward of the last step's pictures (DMDR:
matching holds the student at its teacher's law, tilted by the reward).

Where the student walks is an option, too: ``--diversity_weight`` (DP-DMD, arXiv 2602.03139: its first step is taught by
the teacher's path and the match reaches the others, all of them), ``--schedule random`` and ``--off_trajectory`` (CDM,
arXiv 2605.06376, beside ``--decoupled hybrid --decoupled_normalizer conditional``: times of all kinds).

Departures: x0 conversions use float64 coefficients on float32 samples instead of float64 samples; flow and EDM teachers
get the critic loss of their own output space; data-free but for the GAN. Decoupled DMD's paper does not say
how its terms are normalised: ours are DMD2 where both times are one. f-distill's mean is over one micro-batch. All
samples of a step share one place of CDM's walk, which ends there, instead of each having its own of a whole walk; its
losses have DMD's factor 1/2, both of them. DP-DMD's re-noising time is drawn for each sample, and its critic learns in
every step, on the student's sample where there is one. Of DMDR the reward is here, not its one network in the places
of teacher and critic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.critic.decoupled import refuse_unguided
from fewstep.critic.denoising import CLEANEST, critic_denoising
from fewstep.data.batch import Batch, Real
from fewstep.diffusion.renoising import Renoised, Renoiser
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import Coefficients
from fewstep.errors import UserError
from fewstep.losses.adversarial import discriminator_loss, generator_loss
from fewstep.networks.features import FeatureTap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.head_role import HeadRole
from fewstep.networks.roles import Role
from fewstep.trainers._dmd2_config import Dmd2Config
from fewstep.trainers._dmd2_matching import chosen_matching
from fewstep.trainers._dmd2_sampling import chosen_sampling
from fewstep.trainers._rewards import open_rewards
from fewstep.training.following import pulls_after_student
from fewstep.training.method import Bench, Order, Turn
from fewstep.training.rewards import Rewards

#: A loss () of the critic on the student's x0 (B, ...), and what to log.
CriticLoss = Callable[[Tensor, Batch], tuple[Tensor, dict[str, Tensor]]]


def _signal_power(_: Coefficients, at_t: Coefficients) -> Tensor:
    return at_t.alpha**2


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
        rewards: Rewards | None = None,
        grid_shift: float = 1.0,
    ) -> None:
        config = config.resolved()
        self.config, self.roles, self.sampler, self.tap, self.rewards = config, roles, sampler, tap, rewards
        self.student, self.critic, self.teacher = roles["student"], roles["critic"], guided_teacher
        self.judge = roles.get("discriminator", self.critic)
        self.pulls = pulls_after_student(self.critic, self.student, config.critic_follows_student)
        self.compared = Renoiser(sampler.schedule, config.time_min, config.time_max, shift)
        self.learnt = Renoiser(sampler.schedule, CLEANEST, 1.0, shift)
        self.judged = Renoiser(sampler.schedule, CLEANEST, 1.0)
        which = config, guided_teacher, self.critic, self.compared, self.logits, self.drawn_guidance
        self.matching = chosen_matching(*which)
        walk = self.student, guided_teacher, self.critic, sampler, self.compared, grid_shift
        self.sample = chosen_sampling(config, *walk)
        self.critic_loss: CriticLoss = self.denoising_with_negative if config.swiftbrush else self.denoising

    @classmethod
    def prepare(cls, config: Dmd2Config, bench: Bench) -> Dmd2:
        """Make the roles: student and critic start as the teacher, or as in --init."""
        return cls.prepare_with(config, bench)

    @classmethod
    def prepare_with(cls, config: Dmd2Config, bench: Bench, *more: str) -> Dmd2:
        """The same with the further roles ``more``, for a method around it."""
        config = config.resolved()
        roles = bench.make_roles("student", "critic", *more)
        guided = bench.guided(roles["teacher"])
        if config.decoupled != "none":
            refuse_unguided(bench.recording.guidance, bench.guidance_scale)
        if config.gan_features == "teacher":
            if len(roles["teacher"].experts) > 1:
                raise UserError("--gan_features teacher needs a teacher of one network, and this has several")
            roles["discriminator"] = HeadRole("discriminator", roles["teacher"])
        tap = bench.add_head(roles.get("discriminator", roles["critic"])) if config.has_head else None
        shift = config.shift_of_times(bench.sampler.schedule, bench.shift)
        rewards = open_rewards(config, bench, roles["teacher"])
        if config.schedule == "random":
            bench.describe(trained_at_every_count=True)
        return cls(config, roles, guided, bench.sampler, tap, shift, rewards, bench.shift)

    def learning_rate(self, role: str) -> float:
        """Of the student, or of the critic and a discriminator of its own."""
        return self.config.learning_rate(role)

    def turns(self, step: int, batch: Batch) -> Iterator[Turn | Order]:
        """Every ``critic_updates`` steps the student, and in every step the critic on the same, pre-update sample.

        A discriminator on the frozen teacher's features has a turn of its own behind the critic's.
        """
        # 1. Sample from the student, through its own earlier steps (backward simulation, §4.5).
        student_turn = step % self.config.critic_updates == 0
        with torch.set_grad_enabled(student_turn):
            x0, called_at, finished, pieces, log = self.sample(batch, student_turn)

        # 2. The student: distribution matching (§3), and the critic's features must look real (§4.3).
        if student_turn:
            gradient, matched = self.matching(x0.detach(), batch, called_at)
            pieces.insert(0, (x0, gradient))
            log = matched | log
            if self.config.gan_weight > 0:
                adversarial = generator_loss(self.logits(self.judged(x0, batch.draws, "student"), batch))
                pieces.append((self.config.gan_weight * adversarial, None))
                log["student/adversarial"] = adversarial.detach()
            if self.rewards is not None:
                log |= self.rewarded(self.rewards, pieces, x0, step, finished, batch)
            yield Turn("student", pieces, log)
            pieces.clear()  # the graph is spent; a generator holds none across a yield
            if self.config.follow_after == "student":
                yield from self.pulls
        x0 = x0.detach()

        # 3. The critic: denoise the student's sample at a time of its own (§4.2), and tell real from fake.
        loss, log = self.critic_loss(x0, batch)
        pieces = [(loss, None)]
        if self.tap is not None and self.judge is self.critic:
            adversarial = self.real_from_fake(x0, batch)
            pieces.append((self.config.gan_critic_weight * adversarial, None))
            log["critic/adversarial"] = adversarial.detach()
        yield Turn("critic", pieces, log)
        pieces.clear()
        if self.config.follow_after == "critic":
            yield from self.pulls

        # 4. On the teacher's features only the head learns, so it has an optimizer of its own, and no weight.
        if self.tap is not None and self.judge is not self.critic:
            adversarial = self.real_from_fake(x0, batch)
            yield Turn("discriminator", [(adversarial, None)], {"discriminator/adversarial": adversarial.detach()})

    def real_from_fake(self, x0: Tensor, batch: Batch) -> Tensor:
        """The loss () of telling the student's ``x0`` (B, ...) from the batch's real samples."""
        fake = self.logits(self.judged(x0, batch.draws, "fake"), batch)
        real = self.logits(self.judged(batch.real.x0, batch.draws, "real"), batch.real)
        return discriminator_loss(real, fake)

    def rewarded(
        self,
        rewards: Rewards,
        pieces: list[tuple[Tensor, Tensor | None]],
        x0: Tensor,
        step: int,
        finished: bool,
        batch: Batch,
    ) -> dict[str, Tensor]:
        """Add the reward of a finished sample to the pieces of the student's turn. Returns what to log."""
        log: dict[str, Tensor] = {}
        if rewards.begun(step) and finished:
            loss, log = rewards.term(x0, batch)
            pieces.append((loss, None))
        if rewards.due(step, self.config.critic_updates):
            log |= rewards.look(self.student, self.sampler, batch)
        return log

    def drawn_guidance(self, batch: Batch) -> Tensor | None:
        """The scale (B,) of both in SwiftBrush's gradient, where it is not the run's."""
        return None

    def denoising(self, x0: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's loss () on the student's ``x0`` (B, ...), and what to log."""
        in_x0 = self.config.critic_loss == "x0"
        return critic_denoising(self.critic, self.roles["teacher"], x0, batch, self.learnt, in_x0=in_x0)

    def denoising_with_negative(self, x0: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """SwiftBrush's critic: weighted by alpha^2, and told the negative in a tenth of the steps, as it is guided."""
        if self.teacher.further and batch.draws.shared_integer("critic_drop", 0, 10) == 0:
            batch = replace(batch, conditioning=batch.conditioning.others[-1])
        return critic_denoising(self.critic, self.roles["teacher"], x0, batch, self.learnt, _signal_power)

    def logits(self, seen: Renoised, of: Batch | Real) -> Tensor:
        """What the head (B,) says of noised samples, each use at times of its own (diffusion GAN)."""
        assert self.tap is not None  # who has a head is tapped, and nobody else is asked
        features = self.judge.denoiser.features(seen.x_t, seen.t, of.conditioning, self.tap)
        return self.judge.added["head"](features)


if __name__ == "__main__":
    main("dmd2")
