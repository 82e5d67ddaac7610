"""Continuous-time consistency (sCM, rCM, TCM): f is the same at times of a trajectory that lie infinitely close.

The student is moved along f's derivative by the time on its trajectories, the tangent: no grid, no second time, and no
error of a discretisation. ``--variant`` says how:

- ``scm``: sCM (Lu & Song 2024, arXiv 2410.11081) along the guided teacher's trajectories, or with ``--velocity data``
  those of real images
- ``rcm``: rCM (Zheng et al. 2025, arXiv 2510.08431), the same with distribution matching of the student's own samples
- ``tcm``: the second stage of a truncated consistency model (Lee et al. 2024, arXiv 2410.14895): trained above a noise
  level alone, where the first stage (``--init``) stays fixed

    accelerate launch -m fewstep.trainers.continuous_consistency --teacher DIR --prompts FILE --steps 2 --out OUT

Teachers of every kind: the formulas are TrigFlow's, the network stays in its own schedule and says what it always said
(:mod:`fewstep.diffusion.trig_flow`), so f is x0 and a stock scheduler of consistency models samples the student.

Departures: no dropout, no other time embedding, AdamW in the place of RAdam. The derivative is of a pass of its own,
without gradient. Without ``--data`` the samples are the teacher's, made ahead. rCM's sums over a sample are means here
(an optimizer of Adam's kind sees no difference), its number of steps is drawn, and its critic has the loss of its own
output, as in DMD2. TCM's first stage is asked for the samples at the transition alone, all others have neighbours above
it; noise levels are EDM's under every schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.conditioning.ragged import AnyConditioning
from fewstep.config.checks import settled
from fewstep.critic.denoising import CLEANEST, critic_denoising, sample_log
from fewstep.critic.matching import matching_log
from fewstep.data.batch import Batch
from fewstep.diffusion.discretization import SigmaRange, TimePair
from fewstep.diffusion.noise_levels import NoiseLevels
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.renoising import Renoiser
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import EDMSchedule, TableSchedule
from fewstep.diffusion.trig_flow import TrigFlow
from fewstep.diffusion.truncated import TruncatedTimes
from fewstep.errors import UserError
from fewstep.losses.consistency import distance, weight
from fewstep.losses.score import distribution_matching
from fewstep.losses.trig_flow import by_log_variance, normalized, tangent, tangent_loss
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.log_variance import LOG_VARIANCE, LogVariance
from fewstep.networks.roles import Role
from fewstep.networks.trig_flow import Point, TrigFlowNetwork
from fewstep.sending import known_too, sent
from fewstep.trainers._continuous_consistency_config import ContinuousConsistencyConfig
from fewstep.training.method import Bench, Turn


class ContinuousConsistency:
    """The method; see the module. Roles: student, teacher, ema if asked for; rcm: critic; tcm: target, which stays."""

    Config = ContinuousConsistencyConfig

    def __init__(
        self,
        config: ContinuousConsistencyConfig,
        roles: dict[str, Role],
        guided_teacher: GuidedDenoiser,
        sampler: Sampler,
        shift: float = 1.0,
    ) -> None:
        config = config.resolved()
        self.config, self.roles, self.sampler, self.schedule = config, roles, sampler, sampler.schedule
        self.student, self.teacher = roles["student"], guided_teacher
        own = getattr(self.schedule, "sigma_data", 1.0)
        self.trig = trig = TrigFlow(self.schedule, own if config.sigma_data is None else config.sigma_data)
        self.levels = NoiseLevels("log_normal", mean=settled(config.level_mean), std=settled(config.level_std))
        if config.variant == "tcm":
            self.times = self.truncated_times()
            return
        how = config.derivative, config.derivative_step
        self.output = TrigFlowNetwork(roles["student"].single.denoiser, trig, *how)
        # Guidance mixes F as it does x0.
        self.direction = guided_teacher.of(TrigFlowNetwork(roles["teacher"].single.denoiser, trig))
        self.compared = Renoiser(self.schedule, config.time_min, config.time_max, shift)
        self.learnt = Renoiser(self.schedule, CLEANEST, 1.0, shift)

    @classmethod
    def prepare(cls, config: ContinuousConsistencyConfig, bench: Bench) -> ContinuousConsistency:
        """Make the roles: the student starts as the teacher, or as in --init."""
        config = config.resolved()
        if config.variant == "tcm":
            roles = bench.make_roles("student", "target")
        else:
            critic = ["critic"] if config.matching else []
            roles = bench.make_differentiated_roles(*critic, exact=config.differentiates)
        if config.log_variance:
            bench.add_module(roles["student"], LOG_VARIANCE, LogVariance)
        bench.describe(trained_at_every_count=True)
        shift = config.shift_of_times(bench.sampler.schedule, bench.shift)
        return cls(config, roles, bench.guided(roles["teacher"]), bench.sampler, shift)

    def learning_rate(self, role: str) -> float:
        """Of the student or the critic."""
        return self.config.learning_rate(role)

    def target_decay(self, step: int) -> float:
        """TCM's first stage stays as it is."""
        return 1.0

    @property
    def uneven(self) -> bool:
        """TCM's micro-batch may have no sample at the transition, or no other, and then asks one network less."""
        share, size = self.config.boundary_share, self.config.batch_size
        return self.config.variant == "tcm" and share > 0 and not 1 <= share * size <= size - 1

    def matches(self, step: int) -> bool:
        """Whether rCM's distribution matching has begun."""
        return self.config.matching and step >= settled(self.config.matching_first_step)

    def turns(self, step: int, batch: Batch) -> Iterator[Turn]:
        """The student; once rCM's matching has begun its critic in all but every (critic_updates + 1)-th step."""
        matching = self.matches(step)
        if matching and step % (self.config.critic_updates + 1):
            # rCM's critic: denoise the student's samples at times of its own (§4.3).
            with torch.no_grad():
                x0 = self.sample(batch)
            yield Turn("critic", *self.denoising(x0, batch))
            return

        # 1. Along a trajectory the student says the same (sCM, Alg. 1; TCM, Alg. 1).
        compare = self.truncated if self.config.variant == "tcm" else partial(self.continuous, step)
        loss, log = compare(batch)
        pieces: list[tuple[Tensor, Tensor | None]] = [(settled(self.config.consistency_weight) * loss, None)]

        # 2. rCM: what it samples by itself is to look as the teacher's (§4.3); all sums over a sample are means here.
        if matching:
            x0 = self.sample(batch)
            gradient, more = self.matching(x0.detach(), batch)
            pieces.append((x0, 2 * settled(self.config.matching_weight) * gradient))
            log |= more
        yield Turn("student", pieces, log)

    # --- sCM --------------------------------------------------------------------------------------------------------

    def continuous(self, step: int, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () of the student's F where its trajectories pass, and what to log."""
        config, trig = self.config, self.trig
        at = self.point(batch)
        said = self.output(at.x_t, at.t, at.conditioning)
        change = self.output.derivative(at, said)
        y, angle = trig.sample(at.x_t, at.t), trig.angle(at.t)
        g = tangent(config.variant, said, change, y, at.direction, angle, config.share(step), trig.sigma_data)
        loss = tangent_loss(said, normalized(g, settled(config.tangent_normalization), config.tangent_constant))
        alpha, sigma = self.schedule.coefficients(at.t)
        loss = weight(settled(config.weighting), sigma / alpha, sigma / alpha, trig.sigma_data).to(loss) * loss
        log = {"student/tangent": g.square().mean().sqrt(), "student/derivative": change.square().mean().sqrt()}
        if LOG_VARIANCE in self.student.added:
            loss = by_log_variance(loss, self.student.added[LOG_VARIANCE]((sigma / alpha).log()))
        return loss.mean(), log | {"student/consistency": loss.detach().mean()}

    @torch.no_grad()
    def point(self, batch: Batch) -> Point:
        """Noised samples of the batch, and where the teacher's trajectory, or their own, leads through them."""
        samples = batch.pairs if self.config.data is None else batch.real
        x0, noise, t = samples.x0, batch.draws.normal("noise", batch.shape), self.drawn(batch)
        x_t = add_noise(x0, noise, self.schedule.coefficients(t))
        if self.config.velocity == "data":
            direction = self.trig.output(noise - x0, "flow", x_t, t)
        else:
            direction = self.direction(x_t, t, samples.conditioning)
        return Point(x_t, t, samples.conditioning, self.trig.sigma_data * direction)

    def drawn(self, batch: Batch) -> Tensor:
        """Times (B,) of log-normal noise levels; between a table's second entry and where the student starts."""

        def placed(normal: Tensor) -> Tensor:
            t = self.levels.times(normal, self.schedule)
            if isinstance(self.schedule, EDMSchedule):
                return t
            table = isinstance(self.schedule, TableSchedule)
            lowest = 2 / settled(self.schedule.num_train_timesteps) if table else CLEANEST
            return t.clamp(lowest, self.sampler.grid[0])

        return known_too(placed, batch.draws.normal("level", ()))

    # --- rCM --------------------------------------------------------------------------------------------------------

    def sample(self, batch: Batch) -> Tensor:
        """The student's x0 (B, ...) after some steps, at times that were drawn, with gradient through the last one."""
        earlier = batch.draws.shared_integer("student_step", 0, len(self.sampler.grid))
        x_t = self.sampler.initial_scale * batch.draws.normal("sample_noise", batch.shape)
        t = self.sampler.times(0, x_t)
        for step in range(1, earlier + 1):
            with torch.no_grad():
                x0 = self.student(x_t, t, batch.conditioning)
            t = known_too(torch.minimum, self.compared.times(batch.draws, f"step_{step}"), t)
            noise = batch.draws.normal(f"step_noise_{step}", batch.shape)
            x_t = add_noise(x0, noise, self.schedule.coefficients(t))
        return self.student(x_t, t, batch.conditioning)

    @torch.no_grad()
    def matching(self, x0: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """DMD's gradient (B, ...) at the student's ``x0`` (B, ...), and what to log."""
        here = self.compared(x0, batch.draws, "matching")
        x0_critic, x0_teacher = (who(here.x_t, here.t, batch.conditioning) for who in (self.critic, self.teacher))
        loss, gradient = distribution_matching(x0, x0_teacher, x0_critic, self.config.normalizer_min)
        return gradient, matching_log(loss) | sample_log(x0, x0_teacher)

    @property
    def critic(self) -> Role:
        """rCM's."""
        return self.roles["critic"]

    def denoising(self, x0: Tensor, batch: Batch) -> tuple[list[tuple[Tensor, Tensor | None]], dict[str, Tensor]]:
        """What the critic's turn sends backward, and logs."""
        loss, log = critic_denoising(self.critic, self.roles["teacher"], x0, batch, self.learnt)
        return [(loss, None)], log

    # --- TCM --------------------------------------------------------------------------------------------------------

    def truncated_times(self) -> TruncatedTimes:
        """TCM's noise levels.

        Raises:
            UserError: there are none, or the student would be sampled below the transition.
        """
        config, levels = self.config, SigmaRange(self.schedule, self.sampler.grid[0])
        last = float(levels.at(torch.tensor(self.sampler.grid[-1], dtype=torch.float64)))
        if last < config.transition:
            below = f"{last:.4g}, below --transition {config.transition:g}"
            raise UserError(
                f"the student's last step begins at the noise level {below}, where it is not trained; take fewer "
                "--steps or a lower transition"
            )
        law = config.boundary_share, settled(config.level_mean), settled(config.level_std)
        return TruncatedTimes(levels, config.transition, config.gap, config.mapping_k, config.mapping_b, *law)

    def truncated(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """ECT's loss () above the transition, and at it with the first stage below; and what to log."""
        pair, boundary = self.times.draw(batch.draws)
        noise = batch.draws.normal("noise", batch.shape)
        each = self.compare(batch.real.x0, noise, pair, boundary, batch.real.conditioning)
        loss = (sent(self.shares(len(each), boundary), each.device, each.dtype) * each).mean()
        log = {"student/consistency": loss.detach(), "student/interval": (pair.t - pair.r).mean()}
        return loss, log

    def compare(
        self, x0: Tensor, noise: Tensor, pair: TimePair, below: list[int], conditioning: AnyConditioning
    ) -> Tensor:
        """The weighted distance (B,) of both ends of a pair; that of rows ``below`` is from the first stage."""
        x_t, x_r = (add_noise(x0, noise, self.schedule.coefficients(t)) for t in (pair.t, pair.r))
        with torch.no_grad():
            above = sorted({*range(len(x0))} - {*below})
            parts, order = [], [*above, *below]
            for role, rows in ((self.student, above), (self.roles["target"], below)):
                if rows:
                    places = sent(rows, x_r.device, torch.int64)
                    asked = x_r.index_select(0, places), pair.r.index_select(0, places)
                    parts.append(role(*asked, conditioning.select(rows)))
            back = sent(sorted(range(len(order)), key=order.__getitem__), x_r.device, torch.int64)
            target = torch.cat(parts).index_select(0, back)
        apart = distance(self.config.distance, self.student(x_t, pair.t, conditioning), target, self.config.huber_c)
        return (
            weight(settled(self.config.weighting), pair.sigma_t, pair.sigma_r, self.trig.sigma_data).to(apart) * apart
        )

    def shares(self, size: int, boundary: list[int]) -> list[float]:
        """What each of B samples counts: the mean is that above, plus boundary_weight times that at the transition."""
        share, at = self.config.boundary_share, set(boundary)
        return [self.config.boundary_weight / share if row in at else 1 / (1 - share) for row in range(size)]


if __name__ == "__main__":
    main("continuous_consistency")
