"""MeanFlow: a network that says the average velocity between two times (Geng et al. 2025, arXiv 2505.13447).

Told both ends of a step, the student makes it at once, whatever its length: one checkpoint samples in 1, 2, 4, 8 steps.

    accelerate launch -m fewstep.trainers.mean_flow --teacher DIR --prompts FILE --steps 8 --out OUT

Without ``--data`` the guided teacher's flow is averaged, at noised samples of its own; with it that of real images, the
student starting as the teacher, guided by itself in training. Options: alpha-Flow (arXiv 2510.20771, no derivatives),
improved MeanFlow (arXiv 2512.02012: the derivative along the student's own velocity instead of the target's).

Teachers of every kind: times and velocities are rectified flow's, which x_t / (alpha + sigma) has in every schedule, so
DDPM and EDM teachers stay in their own and stock ODE schedulers carry the student (:mod:`fewstep.networks.flow_map`).

Departures: the second time enters by an added module, zero at first, and as t - r alone. The derivative comes of the
trained pass itself, only where t and r differ; of a pass of its own with ``--gradient_checkpointing`` or
``--sharding``, or of further calls without a graph (``--derivative central``, FastGen's and mf-rae's, one-sided at the
ends of the flow, and at entries of a table alone). Without an auxiliary head, improved MeanFlow's own velocity is
u(x_t, t, t), and its guidance is trained in, no input. alpha-Flow's published runs do not say the c of their weight.
Times end at ``--time_min``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.conditioning.ragged import AnyConditioning
from fewstep.data.batch import Batch
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.scales import one_number
from fewstep.errors import UserError
from fewstep.losses.mean_flow import alpha_flow_target, mean_flow_target, weighted_loss
from fewstep.networks.flow_map import FlowMapDenoiser, gap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import Role
from fewstep.networks.self_guidance import SelfGuidance
from fewstep.sending import sent
from fewstep.trainers._mean_flow_config import MeanFlowConfig
from fewstep.training.method import Bench, Turn


@dataclass(frozen=True)
class Flow:
    """Points of the flow and what is known there.

    Attributes:
        x_t: (B, ...).
        t: (B,), float64; r: (B,), at most t, 0 for the clean sample; both in the schedule's own time.
        r: see t.
        velocity: the flow's, guided (B, ...).
        line: noise - x0 (B, ...), along which the samples were noised.
        conditioning: of B samples.
    """

    x_t: Tensor
    t: Tensor
    r: Tensor
    velocity: Tensor
    line: Tensor
    conditioning: AnyConditioning

    def select(self, rows: list[int]) -> Flow:
        """Some of the points."""
        places = sent(rows, self.t.device, torch.int64)
        x_t, t, r = (of.index_select(0, places) for of in (self.x_t, self.t, self.r))
        velocity, line = (of.index_select(0, places) for of in (self.velocity, self.line))
        return Flow(x_t, t, r, velocity, line, self.conditioning.select(rows))


@dataclass(frozen=True)
class Answers:
    """The student's velocities at some points, and what they shall be.

    Attributes:
        u: the student's (B, ...), with its graph.
        target: (B, ...), held fixed.
        weight: of their losses.
    """

    u: Tensor
    target: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class IntervalAnswers(Answers):
    """Answers where the two times differ.

    Attributes:
        change: the derivative, or alpha-Flow's difference (B, ...).
    """

    change: Tensor = field(kw_only=True)


class MeanFlow:
    """The method; see the module. Roles: student, teacher, ema if asked for; both but the teacher of two times."""

    Config = MeanFlowConfig

    def __init__(
        self, config: MeanFlowConfig, roles: dict[str, Role], guided_teacher: GuidedDenoiser, sampler: Sampler
    ) -> None:
        config = config.resolved()
        self.config, self.roles, self.sampler, self.schedule = config, roles, sampler, sampler.schedule
        student, scale = roles["student"].denoiser, guided_teacher.guidance_scale
        assert isinstance(student, FlowMapDenoiser)  # it is one network
        # Guidance mixes velocities as it does x0.
        self.student, self.teacher = student, guided_teacher.of(roles["teacher"].single.denoiser.velocity)
        self.guide: SelfGuidance | None = None
        omega, kappa = 1.0, 0.0
        if config.velocity == "data":
            omega, kappa = config.self_guidance(one_number(scale, "data's velocity"))
        if (omega, kappa) != (1.0, 0.0):
            if not guided_teacher.further:
                raise UserError("--omega and --kappa guide away from a negative condition, which this teacher lacks")
            interval = config.guidance_t_min, config.guidance_t_max
            self.guide = SelfGuidance(student, omega, kappa, *interval)
        self.times = config.two_times(self.schedule, sampler.grid[0])
        self.difference = config.difference(self.schedule, sampler.grid[0])
        # Blocks that are run again in the backward pass have no tangents there, and divided ones none with a graph.
        whole = config.sharding == "none" and not config.gradient_checkpointing
        self.one_pass = self.difference is None and whole

    @classmethod
    def prepare(cls, config: MeanFlowConfig, bench: Bench) -> MeanFlow:
        """Make the roles: the student starts as the teacher, or as in --init."""
        config = config.resolved()
        roles = bench.make_flow_map_roles(differentiated=config.differentiates)
        bench.describe(trained_at_every_count=True)
        return cls(config, roles, bench.guided(roles["teacher"]), bench.sampler)

    def learning_rate(self, role: str) -> float:
        """Of the student."""
        return self.config.lr

    @property
    def uneven(self) -> bool:
        """Where the times differ in some samples, a process may have none of these, or none of the others."""
        return 0 < self.config.apart < 1

    def turns(self, step: int, batch: Batch) -> Iterator[Turn]:
        """One update of the student in every step (Alg. 1)."""
        # 1. Points of the flow at times t, second times r, which differ in some rows, and the velocity there.
        coins = batch.draws.coins("apart", self.config.apart)
        apart, equal = ([row for row, coin in enumerate(coins) if coin == differs] for differs in (True, False))
        flow = self.flow(batch, apart)

        # 2. Over an interval the student learns by the MeanFlow identity (Eq. 6), elsewhere the velocity itself.
        parts: list[Answers] = []
        log = {"student/derivative": torch.zeros((), device=flow.t.device)}
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
        t, r = self.times.draw(batch.draws, apart)
        x_t = add_noise(x0, noise, self.schedule.coefficients(t))
        if self.config.velocity == "teacher":
            velocity = self.teacher(x_t, t, conditioning)
        elif self.guide is None:
            velocity = noise - x0
        else:
            dropped = batch.draws.coins("label_drop", self.config.label_drop)
            velocity, conditioning = self.guide(noise - x0, x_t, t, conditioning, dropped)
        return Flow(x_t, t, r, velocity, noise - x0, conditioning)

    def interval(self, step: int, flow: Flow) -> IntervalAnswers:
        """What the student says at these points, and the average velocity that it shall say (Eq. 6)."""
        config, student = self.config, self.student
        alpha = config.alpha(step)
        distance = gap(self.schedule, flow.t, flow.r)
        at = flow.x_t, flow.t, flow.conditioning, flow.r
        if alpha > 0:
            later = flow.velocity
            if alpha < 1:
                with torch.no_grad():
                    later = student.later_velocity(*at, flow.velocity, alpha * distance)
            target = alpha_flow_target(flow.velocity, later, alpha, config.alpha_clamp)
            return IntervalAnswers(student.velocity(*at), target, alpha, change=flow.velocity - later)
        direction = flow.velocity
        if config.variant == "improved":
            with torch.no_grad():
                direction = student.velocity(flow.x_t, flow.t, flow.conditioning, flow.t)
        if self.difference is not None:
            along = flow.line if self.difference.kind == "renoise" else direction
            u = student.velocity(*at)
            change = self.difference(student.velocity, self.schedule, *at, along, u.detach())
        else:
            with torch.set_grad_enabled(self.one_pass):
                u, change = student.velocity_and_derivative(*at, direction)
            u = u if self.one_pass else student.velocity(*at)
        share = min(1.0, step / config.tangent_warmup) if config.tangent_warmup else 1.0
        target = mean_flow_target(flow.velocity, change, distance, share)
        return IntervalAnswers(u, target, change=change)

    def loss(self, u: Tensor, target: Tensor) -> Tensor:
        """The weighted error of each sample (B,)."""
        config = self.config
        return weighted_loss(u, target, config.weighting, config.weight_power, config.weight_constant)


if __name__ == "__main__":
    main("mean_flow")
