"""Flash-DMD: each of the student's steps is taught by what it is good for (Tencent 2025, arXiv 2511.20549).

At a noisy step the student's sample is matched with the teacher's distribution, as in DMD2. From there the walk is
finished, its end is noised to a clean step, and what the student makes of that must look real to a discriminator of
pixels; so the two gradients never meet in one call. The critic denoises, and is pulled towards the student after each
update of it (implicit distribution alignment), so that one or two updates of its own are enough.

    accelerate launch -m fewstep.trainers.flash_dmd --teacher DIR --prompts FILE --data IMAGES --steps 4 --out OUT

With ``--reward`` preferences alternate with distillation, five updates to one: of several successors that a noisy
step may have, the student learns to make the best likelier than the worst, beside what it was when preferences began.

No code was released and the paper's body could not be read, so that all this is from notes on it. What they do not say
is our reading: the noisier half of the steps is matched, the loss is non-saturating and of weight 1e-3, the critic
keeps 0.97 of itself and learns from the matched samples, and the discriminator from the judged ones.

Departures: the discriminator's heads look through SAM's encoder where ``--feature_extractor`` names one; the stand-in
is the encoder of the teacher's own autoencoder, and for teachers of pixels convolutions with random weights. Real
images come through the autoencoder, too, so that what it loses gives nobody away. Heads see four levels at even depths.
Successors are ranked by the reward of what the student sees in them, and not by a reward model of noisy latents, which
was not released. The critic follows the student in these updates, too.
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
from fewstep.diffusion.pinned import pinned_again
from fewstep.diffusion.prediction import add_noise, expand
from fewstep.diffusion.renoising import Renoiser
from fewstep.diffusion.rollout import Sampler, ask_at, draw_sample, finish
from fewstep.errors import UserError
from fewstep.losses.preference import log_likelihood_ratio, preference_loss
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.head_role import HeadRole
from fewstep.networks.roles import Role, trained_pairs
from fewstep.trainers._flash_dmd_config import FlashDmdConfig
from fewstep.trainers._rewards import open_rewards
from fewstep.training.method import Bench, Order, Pull, Turn
from fewstep.training.rewards import Rewards


class Called(NamedTuple):
    """A call of the student: what it said of ``x_t`` (B, ...) at a ``step`` of its grid, ``x0`` (B, ...)."""

    x_t: Tensor
    x0: Tensor
    step: int


class FlashDmd:
    """The method; see the module. Roles: student, teacher, critic, discriminator (heads alone), target, ema, if wanted.

    The target is the reference of preferences.
    """

    Config = FlashDmdConfig

    def __init__(
        self,
        config: FlashDmdConfig,
        roles: dict[str, Role],
        guided_teacher: GuidedDenoiser,
        sampler: Sampler,
        judge: ImageJudge | None = None,
        shift: float = 1.0,
        rewards: Rewards | None = None,
    ) -> None:
        config = config.resolved()
        self.config, self.roles, self.sampler, self.judge = config, roles, sampler, judge
        self.rewards = rewards
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
        roles = bench.make_roles("student", "critic", *([] if config.reward is None else ["target"]))
        judge = None
        if config.gan_weight > 0:
            if len(roles["teacher"].experts) > 1:
                raise UserError("--gan_weight needs a teacher of one network, and this has several; give 0")
            roles["discriminator"] = heads = HeadRole("discriminator", roles["teacher"])
            judge = ImageJudge(heads, bench.add_image_heads(heads, config.feature_extractor), config.gan_loss)
        shift = config.shift_of_times(bench.sampler.schedule, bench.shift)
        rewards = open_rewards(config, bench, roles["teacher"])
        return cls(config, roles, bench.guided(roles["teacher"]), bench.sampler, judge, shift, rewards)

    def learning_rate(self, role: str) -> float:
        """Of the student, the critic or the discriminator."""
        return self.config.learning_rate(role)

    def target_decay(self, step: int) -> float:
        """The reference is the student until preferences begin, and then stays."""
        return 1.0 if step >= self.config.reward_start_step else 0.0

    def turns(self, step: int, batch: Batch) -> Iterator[Turn | Order]:
        """Every ``critic_updates`` steps the student and the discriminator, and in every step the critic."""
        if self.rewards is not None and self.config.prefers(step):
            yield self.preference_turn(self.rewards, step, batch)
            if self.config.critic_follows_student < 1:
                yield Pull("critic", "student", self.config.critic_follows_student)
            return

        # 1. Sample from the student up to one of its noisy steps.
        student_turn = self.config.student_moves(step)
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

    def preference_turn(self, rewards: Rewards, step: int, batch: Batch) -> Turn:
        """The student's update by preferences between successors of a noisy step."""
        x_t, x0, place = self.called(batch)
        t, then = (self.sampler.times(k, x_t) for k in (place, place + 1))
        there = self.sampler.schedule.coefficients(then)
        alpha = expand(there.alpha, x0)
        with torch.no_grad():
            names = [f"successor_{k}" for k in range(self.config.preference_candidates)]
            moved = [add_noise(x0, batch.draws.normal(name, batch.shape), there) for name in names]
            walk, first = (batch.conditioning, self.sampler.schedule, x_t, t), self.sampler.first(place)
            successors = [pinned_again(*walk, one, then, first) for one in moved]
            seen = (ask_at(self.student, self.sampler, place + 1, z, batch.conditioning) for z in successors)
            scores = torch.stack([rewards.scores(one, batch.asked) for one in seen])
            rows = torch.arange(batch.size, device=x0.device)
            best, worst = (torch.stack(successors)[which, rows] for which in (scores.argmax(0), scores.argmin(0)))
            reference = alpha * self.roles["target"](x_t, t, batch.conditioning, end=then)
        better, worse = (log_likelihood_ratio(z, alpha * x0, reference, there.sigma) for z in (best, worst))
        loss = preference_loss(better, worse, self.config.preference_beta)
        log = {"student/preference": loss.detach(), "student/preferred_by": (scores.amax(0) - scores.amin(0)).mean()}
        since = step - self.config.reward_start_step
        if rewards.due(since, self.config.preference_updates + self.config.critic_updates):
            log |= rewards.look(self.student, self.sampler, batch)
        return Turn("student", [(self.config.reward_weight * loss, None)], log)

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
