"""AnyFlow: a flow map, and distribution matching on what its own shortcuts lead to (arXiv 2605.13724).

Stage 1 teaches a student the average velocity between any two times. Stage 2 follows its samplers of every length by at
most three steps of that map, and pushes where they end towards the teacher, with a critic; the map's loss stays beside.

    accelerate launch -m fewstep.trainers.any_flow --teacher DIR --prompts FILE --steps 8 --out OUT

``--stage map`` and ``--stage on_policy --init RUN`` are the stages alone. Teachers of every kind: times and velocities
are rectified flow's (:mod:`fewstep.networks.flow_map`).

Departures: the map is the guided teacher's by default, tangent and target alike, and starts exactly as the teacher.
``--velocity data`` is the authors' form, whose fixed point is not the guided map: of the null condition it takes the
average velocity instead of the velocity, and the tangent of the unguided flow; there the derivative is divided by the
scale where the condition was kept, as in FastGen. No derivative is asked where the times agree, and none beyond the
ends of an interval. Places in the batch are spread, so that every process has its share of each kind of times;
rebalancing is by micro-batch, relative to the level. Stage 0 (the teacher's own fine-tuning) is another run. One
average and one pair of betas serve both stages; the critic sees the prompts of the student's turn, with noise and a
rollout of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.conditioning.ragged import AnyConditioning, without_condition
from fewstep.config.checks import settled
from fewstep.critic.denoising import critic_denoising, sample_log
from fewstep.critic.matching import Matched, matching_log
from fewstep.data.batch import Batch
from fewstep.diffusion.placed_times import Parts, parts_of, spread_places, time_table
from fewstep.diffusion.prediction import add_noise, expand
from fewstep.diffusion.renoising import Renoiser
from fewstep.diffusion.rollout import Sampler, rollout, shortcut
from fewstep.diffusion.scales import one_number
from fewstep.diffusion.timesteps import even_grid
from fewstep.losses.flow_map import fused_guidance, rebalanced, time_weight
from fewstep.losses.mean_flow import mean_flow_target, weighted_loss
from fewstep.losses.score import distribution_matching
from fewstep.networks.flow_map import FlowMapDenoiser, gap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import Role
from fewstep.sending import sent
from fewstep.trainers._any_flow_config import AnyFlowConfig
from fewstep.training.distributed import sum_over_processes
from fewstep.training.method import Bench, Renew, Turn

# Of the table of weights by time (the authors').
_WEIGHT_ENTRIES = 1000
# Of the level, in the denominator that a rebalanced loss is divided by.
_REBALANCE_EPS = 1e-5


@dataclass(frozen=True)
class Points:
    """Points of the flow and what is known there.

    Attributes:
        x_t: (B, ...).
        t: (B,), float64; r: (B,), at most t; both in the schedule's own time.
        r: see t.
        velocity: along which the sample moves (B, ...).
        conditioning: of B samples, some of which may have lost theirs.
        kept: bool (B,), whose condition was kept.
        parts: rows by how their times are tied.
    """

    x_t: Tensor
    t: Tensor
    r: Tensor
    velocity: Tensor
    conditioning: AnyConditioning
    kept: Tensor
    parts: Parts


class Rolled(NamedTuple):
    """Whence a rollout came: its unit noise (B, ...), and of how many steps the sampler is whose shortcut it took."""

    noise: Tensor
    steps: int


class AnyFlow:
    """The method; see the module. Roles: student (and ema) of two times, teacher, and in stage 2 a critic."""

    Config = AnyFlowConfig

    def __init__(
        self,
        config: AnyFlowConfig,
        roles: dict[str, Role],
        guided_teacher: GuidedDenoiser,
        sampler: Sampler,
        grids: Mapping[int, tuple[float, ...]] | None = None,
        shift: float = 1.0,
    ) -> None:
        config = config.resolved()
        self.config, self.roles, self.sampler, self.schedule = config, roles, sampler, sampler.schedule
        self.teacher = guided_teacher
        if "critic" in roles:
            self.critic = roles["critic"]
        student = roles["student"].denoiser
        assert isinstance(student, FlowMapDenoiser)  # it is one network
        # Guidance mixes velocities as it does x0.
        velocity = roles["teacher"].single.denoiser.velocity
        self.student, self.mapped = student, guided_teacher.of(velocity, config.map_guidance)
        # Where data's velocity is followed, by how much the student's own answers are guided.
        given = self.mapped.guidance_scale
        self.fused = float(one_number(given, "data's velocity")) if config.velocity == "data" else 1.0
        self.times = config.two_times(self.schedule, sampler.grid[0], shift)
        self.difference = config.difference(self.schedule, self.times.high)
        self.weight = time_weight(config.weighting, time_table(_WEIGHT_ENTRIES, shift))
        self.grids = {n: (grids or {}).get(n) or tuple(even_grid(n, shift).tolist()) for n in config.rollouts}
        self.compared = Renoiser(self.schedule, config.time_min, config.time_max, shift)
        normal = (config.critic_time_mean, config.critic_time_std) if config.critic_times == "logit_normal" else None
        self.learnt = Renoiser(self.schedule, config.time_min, 1.0, shift, normal=normal)

    @classmethod
    def prepare(cls, config: AnyFlowConfig, bench: Bench) -> AnyFlow:
        """Make the roles: student and critic start as the teacher, or as in --init."""
        config = config.resolved()
        config.refuse_wrong_order()
        critic = () if config.stage == "map" else ("critic",)
        differentiated = config.maps and config.derivative == "exact"
        roles = bench.make_flow_map_roles(*critic, differentiated=differentiated)
        bench.describe(trained_at_every_count=True)
        shift = config.shift_of_times(bench.sampler.schedule, bench.shift)
        return cls(config, roles, bench.guided(roles["teacher"]), bench.sampler, bench.grids, shift)

    def learning_rate(self, role: str) -> float:
        """Of the student or the critic, in the run's first stage."""
        return self.config.rate(role, 0)

    def learning_rate_at(self, role: str, step: int) -> float:
        """Of the student or the critic, in the stage of ``step``."""
        return self.config.rate(role, step)

    @property
    def uneven(self) -> bool:
        """Whose times differ is by place, and one process may have more such samples than another."""
        return self.config.maps and self.config.equal_share > 0

    def turns(self, step: int, batch: Batch) -> Iterator[Turn | Renew]:
        """In stage 1 an update of the student; in stage 2 one every ``critic_updates`` steps, and one of the critic."""
        config = self.config
        since = step - config.first_on_policy_step
        if since < 0:
            loss, log = self.map_loss(batch)
            yield Turn("student", [(loss, None)], log)
            return
        if since == 0 and config.stage == "both":
            yield Renew("student", like="ema" if "ema" in self.roles else "student")

        # 1. The student: where a shortcut of its sampler ends, distribution matching; and the map, on samples given.
        if since % config.critic_updates == 0:
            x0, rolled = self.rollout(batch, "student")
            gradient, log = self.matching(x0.detach(), batch)
            pieces: list[tuple[Tensor, Tensor | None]] = [(x0, gradient)]
            if batch.logging:
                log["student/shortcut_gap"] = self.shortcut_gap(batch, x0.detach(), rolled)
            if config.map_weight > 0:
                loss, map_log = self.map_loss(batch)
                pieces.append((config.map_weight * loss, None))
                log |= map_log
            yield Turn("student", pieces, log)
            pieces.clear()  # the graph is spent; a generator holds none across a yield

        # 2. The critic: denoise where another rollout ends, at times of a law of its own.
        with torch.no_grad():
            x0, _ = self.rollout(batch, "critic_rollout")
        loss, log = critic_denoising(self.critic, self.roles["teacher"], x0, batch, self.learnt)
        yield Turn("critic", [(loss, None)], log)

    # --- the map --------------------------------------------------------------------------------------------------

    def map_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () of the flow map on noised samples of the batch, and what to log."""
        points = self.points(batch)
        u = self.student.velocity(points.x_t, points.t, points.conditioning, points.r)
        u, target, change = self.guided(points, u, self.change(points, u))
        each = self.errors(points, u, target)
        log = {"student/flow_map": each.detach().mean(), "student/derivative": change.square().mean().sqrt()}
        log["student/map_error"] = (u.detach() - target).square().mean()
        return self.balanced(points, each).mean(), log

    @torch.no_grad()
    def points(self, batch: Batch) -> Points:
        """Noised samples of the batch at times t, with second times r, and the velocity there."""
        samples = batch.real if self.config.data is not None else batch.pairs
        x0, noise, conditioning = samples.x0, batch.draws.normal("map_noise", batch.shape), samples.conditioning
        parts = self.parts(batch)
        t, r = self.times.draw(batch.draws, parts)
        x_t = add_noise(x0, noise, self.schedule.coefficients(t))
        kept = torch.ones(len(x0), dtype=torch.bool, device=x0.device)
        if self.config.velocity == "teacher":
            return Points(x_t, t, r, self.mapped(x_t, t, conditioning), conditioning, kept, parts)
        if self.fused != 1.0:
            dropped = batch.draws.coins("label_drop", self.config.label_drop)
            conditioning = without_condition(conditioning, dropped)
            kept = ~sent(dropped, x0.device, torch.bool)
        return Points(x_t, t, r, noise - x0, conditioning, kept, parts)

    def parts(self, batch: Batch) -> Parts:
        """How the two times of each row are tied, by its place in the whole step."""
        total = batch.per_step or batch.size
        places = [spread_places(total)[index] for index in batch.draws.indices]
        return parts_of(places, total, self.config.equal_share, self.config.zero_share)

    def guided(self, points: Points, u: Tensor, change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the student says, what it shall say, and the derivative in that; (B, ...) each.

        Args:
            points: of the flow.
            u: the student's average velocity (B, ...), which is fused with guidance where data's velocity is followed.
            change: its derivative along the velocity (B, ...).
        """
        if self.fused != 1.0:
            with torch.no_grad():
                u_null = self.student.velocity(points.x_t, points.t, points.conditioning.others[-1], points.r)
            # Who has no condition is not guided: its own answer is the null one.
            u = torch.where(expand(points.kept, u).bool(), fused_guidance(u, u_null, self.fused), u)
            change = change / expand(torch.where(points.kept, self.fused, 1.0), change)
        return u, mean_flow_target(points.velocity, change, gap(self.schedule, points.t, points.r)), change

    @torch.no_grad()
    def change(self, points: Points, u: Tensor) -> Tensor:
        """d u / d tau (B, ...) along the velocity; 0 where the times agree, and nothing is asked of the student.

        ``u``: the student's average velocity (B, ...).
        """
        change = torch.zeros_like(points.x_t)
        if not points.parts.apart:
            return change
        rows = sent(points.parts.apart, change.device, torch.int64)
        x_t, t, r, velocity = (of.index_select(0, rows) for of in (points.x_t, points.t, points.r, points.velocity))
        at = x_t, t, points.conditioning.select(points.parts.apart), r, velocity
        if self.difference is None:
            _, there = self.student.velocity_and_derivative(*at)
        else:
            here = u.detach().index_select(0, rows)
            there = self.difference(self.student.velocity, self.schedule, *at, here)
        return change.index_copy(0, rows, there.to(change.dtype))

    def errors(self, points: Points, u: Tensor, target: Tensor) -> Tensor:
        """Each sample's mean squared error, weighted by itself and by its time; (B,)."""
        weight = self.weight.at(self.schedule.flow_time(points.t))
        each = weighted_loss(u, target, "mean", settled(self.config.weight_power), self.config.weight_constant)
        return weight.to(each) * each

    def balanced(self, points: Points, each: Tensor) -> Tensor:
        """The losses (B,) with those of differing times at the level of the others, where the run asks for it."""
        if not self.config.rebalance:
            return each
        apart = torch.zeros(len(each), dtype=torch.bool, device=each.device)
        apart = apart.index_fill(0, sent(points.parts.apart, each.device, torch.int64), True)
        total, count = each.detach()[~apart].sum(), (~apart).sum().to(each)
        sum_over_processes([total, count])
        level = total / count.clamp(min=1)
        # A micro-batch without a sample to measure by stays as it is.
        return torch.where(count > 0, rebalanced(each, apart, level, _REBALANCE_EPS * level), each)

    # --- on policy ------------------------------------------------------------------------------------------------

    def rollout(self, batch: Batch, name: str) -> tuple[Tensor, Rolled]:
        """Where a sampler of a drawn number of steps ends, x0 (B, ...), by at most three steps of the map.

        The gradient passes through all of them.
        """
        count, grid = self.shortcut_drawn(batch, name)
        noise = batch.draws.normal(f"{name}_noise", batch.shape)
        return self.walk(grid, noise, batch), Rolled(noise, count)

    def shortcut_drawn(self, batch: Batch, name: str) -> tuple[int, tuple[float, ...]]:
        """Of how many steps the sampler of a rollout is, and where on its grid the segments start."""
        counts = tuple(self.grids)
        count = counts[batch.draws.shared_integer(f"{name}_steps", 0, len(counts))]
        # So turned that the last number, which a dry run draws, is no shorter than any.
        place = (batch.draws.shared_integer(f"{name}_segment", 0, count) + 1 + count // 2) % count
        return count, shortcut(self.grids[count], place, settled(self.config.segments))

    def walk(self, grid: tuple[float, ...], noise: Tensor, batch: Batch) -> Tensor:
        """Where the student's own walk along ``grid`` ends, x0 (B, ...), with gradient through all of it."""
        sampler = replace(self.sampler, grid=grid, renoise="ode")  # as a map walks, whatever the plan was made for
        return rollout(self.roles["student"], sampler, noise, batch.conditioning, gradient_from=0)

    @torch.no_grad()
    def shortcut_gap(self, batch: Batch, x0: Tensor, rolled: Rolled) -> Tensor:
        """How far ``x0`` is from where every step of the sampler leads, in standard deviations of that; ()."""
        every = self.walk(self.grids[rolled.steps], rolled.noise, batch)
        return (x0 - every).square().mean().sqrt() / every.std()

    @torch.no_grad()
    def matching(self, x0: Tensor, batch: Batch) -> Matched:
        """The gradient (B, ...) of distribution matching at ``x0``, whose loss has no factor 1/2 here, and the log."""
        here = self.compared(x0, batch.draws, "matching")
        x0_critic, x0_teacher = (role(here.x_t, here.t, batch.conditioning) for role in (self.critic, self.teacher))
        loss, gradient = distribution_matching(x0, x0_teacher, x0_critic, self.config.normalizer_min)
        broken = ~torch.isfinite(x0_teacher - x0_critic).flatten(1).all(1)
        log = matching_log(loss) | sample_log(x0, x0_teacher) | {"student/broken_answers": broken.double().mean()}
        return 2 * self.config.matching_weight * gradient, log


if __name__ == "__main__":
    main("any_flow")
