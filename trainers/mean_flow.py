"""MeanFlow: a network that says the average velocity between two times (Geng et al. 2025, arXiv 2505.13447).

Told both ends of a step, the student makes it at once, whatever its length: one checkpoint samples in 1, 2, 4, 8 steps.

    accelerate launch -m fewstep.trainers.mean_flow --teacher DIR --prompts FILE --steps 8 --out OUT

Without ``--data`` the guided teacher's flow is averaged, at noised samples of its own; with it that of real images, the
student starting as the teacher, guided by itself in training. Options: alpha-Flow (arXiv 2510.20771, no derivatives),
improved MeanFlow (arXiv 2512.02012: the derivative along the student's own velocity instead of the target's).

Teachers of every kind: times and velocities are rectified flow's, which x_t / (alpha + sigma) has in every schedule, so
DDPM and EDM teachers stay in their own and stock ODE schedulers carry the student (:mod:`fewstep.networks.flow_map`).

Departures: the second time enters by an added module, zero at first, and as t - r alone. The derivative comes of the
trained pass itself, only where t and r differ; of a pass of its own with ``--gradient_checkpointing``, or where they
differ in more than a third of the samples. Without an auxiliary head, improved MeanFlow's own velocity is u(x_t, t, t),
and its guidance is trained in, no input. alpha-Flow's published runs do not say the c of their weight. Times end at
``--time_min``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.conditioning.ragged import AnyConditioning, join
from fewstep.data.batch import Batch
from fewstep.diffusion.prediction import add_noise, expand, to_velocity
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.timesteps import logit_normal_times, shift_time
from fewstep.errors import UserError
from fewstep.losses.mean_flow import alpha_flow_target, mean_flow_target, weighted_loss
from fewstep.networks.flow_map import FlowMapDenoiser, gap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import Role
from fewstep.trainers._mean_flow_config import MeanFlowConfig
from fewstep.training.method import Bench, Turn

# A trained pass with tangents keeps 2.7 times the activations until it ends. For a third of the batch that is less than
# the whole batch keeps in the end; for three quarters it is twice as much, and no faster.
_ONE_PASS = 1 / 3


@dataclass(frozen=True)
class Flow:
    """Points of the flow and what is known there.

    Attributes:
        x_t: (B, ...).
        t: (B,), float64; r: (B,), at most t, 0 for the clean sample; both in the schedule's own time.
        r: see t.
        velocity: the flow's, guided (B, ...).
        conditioning: of B samples.
    """

    x_t: Tensor
    t: Tensor
    r: Tensor
    velocity: Tensor
    conditioning: AnyConditioning

    def select(self, rows: list[int]) -> Flow:
        """Some of the points."""
        tensors = (value[rows] for value in (self.x_t, self.t, self.r, self.velocity))
        return Flow(*tensors, self.conditioning.select(rows))


@dataclass(frozen=True)
class Answers:
    """The student's velocities at some points, and what they shall be.

    Attributes:
        u: the student's (B, ...), with its graph.
        target: (B, ...), held fixed.
        change: the derivative, or alpha-Flow's difference (B, ...), None where both times are one.
        weight: of their losses.
    """

    u: Tensor
    target: Tensor
    change: Tensor | None = None
    weight: float = 1.0


class MeanFlow:
    """The method; see the module. Roles: student, teacher, ema if asked for; both but the teacher of two times."""

    Config = MeanFlowConfig

    def __init__(
        self, config: MeanFlowConfig, roles: dict[str, Role], guided_teacher: GuidedDenoiser, sampler: Sampler
    ) -> None:
        config = config.resolved()
        self.config, self.roles, self.sampler, self.schedule = config, roles, sampler, sampler.schedule
        teacher, self.negative = roles["teacher"].denoiser, guided_teacher.negative
        self.student: FlowMapDenoiser = roles["student"].denoiser

        def velocity(x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
            return to_velocity(teacher.raw(x_t, t, conditioning), teacher.prediction_type, x_t, self.schedule, t)

        self.teacher = guided_teacher.of(velocity)
        self.omega, self.kappa = 1.0, 0.0
        if config.velocity == "data":
            self.omega, self.kappa = config.self_guidance(guided_teacher.guidance_scale)
            if self.guided and self.negative is None:
                raise UserError("--omega and --kappa guide away from a negative condition, which this teacher lacks")
        # Blocks that are run again in the backward pass have no tangents there.
        self.one_pass = config.apart <= _ONE_PASS and not config.gradient_checkpointing
        ends = self.schedule.flow_time(torch.tensor([0.0, sampler.grid[0]], dtype=torch.float64)).tolist()
        self.lowest, self.highest = max(config.time_min, ends[0]), ends[1]

    @classmethod
    def prepare(cls, config: MeanFlowConfig, bench: Bench) -> MeanFlow:
        """Make the roles: the student starts as the teacher, or as in --init."""
        config = config.resolved()
        roles = bench.make_flow_map_roles(differentiated=config.differentiates)
        bench.describe(trained_at_every_count=True)
        return cls(config, roles, bench.guided(roles["teacher"]), bench.sampler)

    @property
    def guided(self) -> bool:
        """Whether a flow from data is guided by the student."""
        return self.omega != 1.0 or self.kappa != 0.0

    def learning_rate(self, role: str) -> float:
        """Of the student."""
        return self.config.lr

    def turns(self, step: int, batch: Batch) -> Iterator[Turn]:
        """One update of the student in every step (Alg. 1)."""
        # 1. Points of the flow at times t, second times r, which differ in some rows, and the velocity there.
        coins = batch.draws.coins("apart", self.config.apart)
        apart, equal = ([row for row, coin in enumerate(coins) if coin == differs] for differs in (True, False))
        flow = self.flow(batch, apart)

        # 2. Over an interval the student learns by the MeanFlow identity (Eq. 6), elsewhere the velocity itself.
        parts, log = [], {"student/derivative": torch.zeros((), device=flow.t.device)}
        if apart:
            interval = self.interval(step, flow.select(apart))
            parts.append(interval)
            log["student/derivative"] = interval.change.square().mean().sqrt()
        if equal:
            at = flow.select(equal)
            parts.append(Answers(self.student.velocity(at.x_t, at.t, at.conditioning, at.r), at.velocity))

        # 3. Each sample's error, by an adaptive weight (§4.2).
        loss = torch.cat([part.weight * self.loss(part.u, part.target) for part in parts]).mean()
        errors = torch.cat([part.u.detach() - part.target for part in parts])
        log |= {"student/mean_flow": loss.detach(), "student/velocity_error": errors.square().mean()}
        yield Turn("student", [(loss, None)], log)

    @torch.no_grad()
    def flow(self, batch: Batch, apart: list[int]) -> Flow:
        """Noised samples of the batch, which may have lost their condition, and the guided velocity there."""
        samples = batch.real if self.config.data is not None else batch.pairs
        x0, noise, conditioning = samples.x0, batch.draws.normal("noise", batch.shape), samples.conditioning
        t, r = self.times(batch, apart)
        x_t = add_noise(x0, noise, self.schedule.coefficients(t))
        if self.config.velocity == "teacher":
            return Flow(x_t, t, r, self.teacher(x_t, t, conditioning), conditioning)
        velocity = noise - x0
        if not self.guided:
            return Flow(x_t, t, r, velocity, conditioning)
        # MeanFlow, Eq. 19 and 20. Who has no condition is not guided, so that the student knows that flow too.
        kept = [not coin for coin in batch.draws.coins("label_drop", self.config.label_drop)]
        rows = [(conditioning if keep else self.negative).select([i if keep else 0]) for i, keep in enumerate(kept)]
        conditioning = conditioning if all(kept) else join(rows)
        inside = self.schedule.flow_time(t)
        inside = (inside >= self.config.guidance_t_min) & (inside <= self.config.guidance_t_max)
        inside &= torch.tensor(kept, device=t.device)
        guided = self.guide(velocity, x_t, t, conditioning)
        return Flow(x_t, t, r, torch.where(expand(inside, x_t).bool(), guided, velocity), conditioning)

    def guide(self, velocity: Tensor, x_t: Tensor, t: Tensor, conditioning: AnyConditioning) -> Tensor:
        """omega v + kappa u(x_t, t, t, c) + (1 - omega - kappa) u(x_t, t, t, null), (B, ...) (MeanFlow, Eq. 20).

        Where u is this, it is the flow guided by omega / (1 - kappa).
        """
        negative = self.negative.select([0] * len(x_t))
        mixed = self.omega * velocity
        if self.kappa:
            mixed = mixed + self.kappa * self.student.velocity(x_t, t, conditioning, t)
        return mixed + (1 - self.omega - self.kappa) * self.student.velocity(x_t, t, negative, t)

    def times(self, batch: Batch, apart: list[int]) -> tuple[Tensor, Tensor]:
        """t and r (B,), float64; drawn as flow times, and snapped to a table's entries, 0 behind the last."""
        config = self.config
        first = logit_normal_times(batch.draws.normal("t", ()), config.time_mean, config.time_std)
        mean = config.time_mean if config.r_mean is None else config.r_mean
        second = logit_normal_times(batch.draws.normal("r", ()), mean, config.r_std or config.time_std)
        first, second = (shift_time(tau, config.time_shift) for tau in (first, second))
        if config.r_mean is None:
            first, second = torch.maximum(first, second), torch.minimum(first, second)
        t, r = (self.time_at(tau.clamp(self.lowest, self.highest)) for tau in (first, second))
        r = torch.where(second < self.lowest, 0.0, torch.minimum(r, t))
        rows = torch.tensor(apart, dtype=torch.long, device=t.device)
        return t, t.index_copy(0, rows, r[rows])

    def time_at(self, flow_time: Tensor) -> Tensor:
        """The schedule's own time (B,) of a flow time, at an entry of a table."""
        return self.schedule.snap(self.schedule.time_from_flow_time(flow_time))

    def interval(self, step: int, flow: Flow) -> Answers:
        """What the student says at these points, and the average velocity that it shall say (Eq. 6)."""
        config, student = self.config, self.student
        alpha = config.alpha(step)
        distance = gap(self.schedule, flow.t, flow.r)
        at = flow.x_t, flow.t, flow.conditioning, flow.r
        if alpha > 0:
            later = self.later(flow, alpha * distance) if alpha < 1 else flow.velocity
            target = alpha_flow_target(flow.velocity, later, alpha, config.alpha_clamp)
            return Answers(student.velocity(*at), target, flow.velocity - later, alpha)
        direction = flow.velocity
        if config.variant == "improved":
            with torch.no_grad():
                direction = student.velocity(flow.x_t, flow.t, flow.conditioning, flow.t)
        with torch.set_grad_enabled(self.one_pass):
            u, change = student.velocity_and_derivative(*at, direction)
        share = min(1.0, step / config.tangent_warmup) if config.tangent_warmup else 1.0
        target = mean_flow_target(flow.velocity, change, distance, share)
        return Answers(u if self.one_pass else student.velocity(*at), target, change)

    @torch.no_grad()
    def later(self, flow: Flow, distance: Tensor) -> Tensor:
        """u(x_s, r, s) (B, ...), s a flow time ``distance`` (B,) before t, reached along the velocity."""
        alpha, sigma = self.schedule.coefficients(flow.t)
        y = flow.x_t / expand(alpha + sigma, flow.x_t) - expand(distance, flow.x_t) * flow.velocity
        s = self.schedule.time_from_flow_time(self.schedule.flow_time(flow.t) - distance)
        s = torch.maximum(s, flow.r)
        alpha, sigma = self.schedule.coefficients(s)
        return self.student.velocity(y * expand(alpha + sigma, y), s, flow.conditioning, flow.r)

    def loss(self, u: Tensor, target: Tensor) -> Tensor:
        """The weighted error of each sample (B,)."""
        config = self.config
        return weighted_loss(u, target, config.weighting, config.weight_power, config.weight_constant)


if __name__ == "__main__":
    main("mean_flow")
