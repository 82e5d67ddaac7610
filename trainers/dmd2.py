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
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.critic.decoupled import DecoupledMatching, refuse_unguided
from fewstep.critic.denoising import CLEANEST, critic_denoising, sample_log
from fewstep.critic.first_step import TeacherStart, walk_apart
from fewstep.critic.matching import Matched, Matching, matching_log
from fewstep.critic.off_trajectory import OffTrajectory, Walked
from fewstep.data.batch import Batch, Real
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.random_grids import RandomGrid
from fewstep.diffusion.renoising import Renoised, Renoiser
from fewstep.diffusion.rollout import Sampler, draw_sample
from fewstep.diffusion.schedule import Coefficients
from fewstep.diffusion.timesteps import even_grid
from fewstep.errors import UserError
from fewstep.losses.adversarial import discriminator_loss, generator_loss
from fewstep.losses.divergence import DivergenceWeight
from fewstep.losses.score import distribution_matching, score_distillation
from fewstep.networks.features import FeatureTap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.head_role import HeadRole
from fewstep.networks.roles import Role
from fewstep.trainers._dmd2_config import Dmd2Config
from fewstep.trainers._rewards import open_rewards
from fewstep.training.distributed import sum_over_processes
from fewstep.training.following import pulls_after_student
from fewstep.training.method import Bench, Order, Turn
from fewstep.training.rewards import Rewards

#: A loss () of the critic on the student's x0 (B, ...), and what to log.
CriticLoss = Callable[[Tensor, Batch], tuple[Tensor, dict[str, Tensor]]]


class Sampled(NamedTuple):
    """A student's sample.

    Attributes:
        x0: (B, ...).
        called_at: the time at which it was said.
        finished: whether that was at the last step of the walk.
        pieces: what else goes backward in the student's turn.
        log: of those.
    """

    x0: Tensor
    called_at: float
    finished: bool
    pieces: list[tuple[Tensor, Tensor | None]]
    log: dict[str, Tensor]


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
        self.matching: Matching = self.distribution_matching
        self.random_grid: RandomGrid | None = None
        self.off_trajectory: OffTrajectory | None = None
        self.teacher_start: TeacherStart | None = None
        if config.schedule == "random":
            law = config.schedule_fewest, config.schedule_most, config.schedule_low, config.schedule_high
            self.random_grid = RandomGrid(sampler.schedule, sampler.grid[0], *law)
        if config.off_trajectory > 0:
            # Where guidance has a term of its own, the match is with the teacher's condition alone.
            teacher: Denoiser = guided_teacher if config.decoupled == "none" else guided_teacher.denoiser
            how = config.off_trajectory_input, config.off_trajectory_teacher_time, config.normalizer_min
            self.off_trajectory = OffTrajectory(self.student, teacher, self.critic, self.compared, *how)
        if config.diversity_weight > 0:
            grid = even_grid(config.diversity_teacher_steps, grid_shift).tolist()
            times = sampler.grid[0], *[*grid, 0.0][1 : config.diversity_anchor_steps + 1]
            self.teacher_start = TeacherStart(guided_teacher, sampler.schedule, times)
        self.critic_loss: CriticLoss = self.denoising
        if config.swiftbrush:
            self.matching = partial(self.score_distillation, guided_teacher.of(self.critic))
            self.critic_loss = self.denoising_with_negative
        elif config.decoupled != "none":
            self.matching = DecoupledMatching(
                guided_teacher,
                self.critic,
                self.compared,
                config.decoupled,
                config.decoupled_normalizer,
                config.normalizer_min,
            )
        elif config.f_divergence != "none" and "divergence" not in self.critic.added:
            low, high = self.compared.ends
            weight = DivergenceWeight(config.f_divergence, config.f_bins, config.f_momentum, t_min=low, t_max=high)
            self.critic.add("divergence", weight.to(self.critic.parameters()[0].device))

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

    def sample(self, batch: Batch, student_turn: bool) -> Sampled:
        """A sample of the student by its walk, and in its own turn the terms that belong to the walk."""
        if self.teacher_start is not None:
            return self.sample_from_taught_start(self.teacher_start, batch, student_turn)
        sampler = self.sampler
        if self.random_grid is not None:
            sampler = replace(sampler, grid=self.random_grid.draw(batch.draws))
        last = batch.draws.shared_integer("student_step", 0, len(sampler.grid))
        inputs: dict[int, Tensor] = {}
        finished = last == len(sampler.grid) - 1
        walk = (self.student, sampler, batch.draws, batch.shape, batch.conditioning, last)
        x0 = draw_sample(*walk, on_step=inputs.__setitem__)
        if self.off_trajectory is None or not student_turn:
            return Sampled(x0, sampler.grid[last], finished, [], {})
        walked = Walked(inputs[last].detach(), sampler.times(last, x0), x0.detach())
        elsewhere, (gradient, log) = self.off_trajectory(walked, batch)
        return Sampled(x0, sampler.grid[last], finished, [(elsewhere, self.config.off_trajectory * gradient)], log)

    def sample_from_taught_start(self, start: TeacherStart, batch: Batch, student_turn: bool) -> Sampled:
        """DP-DMD's: the whole walk, whose first step is taught apart from the others; the match reaches those."""
        noise, told, sampler = batch.draws.normal("noise", batch.shape), batch.conditioning, self.sampler
        x0, first = walk_apart(self.student, sampler, noise, told)
        if not student_turn:
            return Sampled(x0, sampler.grid[1], True, [], {})
        x = sampler.initial_scale * noise
        loss = start.loss(x, first, start.velocity(x, start.end(x, told)))
        log = {"student/first_step": loss.detach()}
        return Sampled(x0, sampler.grid[1], True, [(self.config.diversity_weight * loss, None)], log)

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

    @torch.no_grad()
    def distribution_matching(self, x0: Tensor, batch: Batch, _called_at: float) -> Matched:
        """DMD's gradient, weighted by f-distill's density ratio where the run asks for it."""
        here = self.compared(x0, batch.draws, "matching")
        x0_critic, x0_teacher = (role(here.x_t, here.t, batch.conditioning) for role in (self.critic, self.teacher))
        weight = None
        if "divergence" in self.critic.added:
            weight = self.critic.added["divergence"](self.logits(here, batch), here.t, sum_over_processes)
        compared = x0 if self.config.normalizer == "x0" else here.x_t
        loss, gradient = distribution_matching(compared, x0_teacher, x0_critic, self.config.normalizer_min, weight)
        return gradient, matching_log(loss) | sample_log(x0, x0_teacher)

    @torch.no_grad()
    def score_distillation(self, critic: GuidedDenoiser, x0: Tensor, batch: Batch, _called_at: float) -> Matched:
        """SwiftBrush's gradient, of a ``critic`` under guidance."""
        here, scale = self.compared(x0, batch.draws, "matching"), self.drawn_guidance(batch)
        x0_critic, x0_teacher = (
            role(here.x_t, here.t, batch.conditioning, guidance_scale=scale) for role in (critic, self.teacher)
        )
        alpha, sigma = self.compared.schedule.coefficients(here.t)
        loss, gradient = score_distillation(x0_teacher, x0_critic, alpha * sigma)
        return gradient, matching_log(loss) | sample_log(x0, x0_teacher)

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
