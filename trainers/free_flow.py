"""FreeFlow: a flow map of one starting time, from noise and a teacher alone (2025, arXiv 2511.19428).

The student says the average velocity u from pure noise z down to any time r. What its own step arrives at, x_r = z -
delta u with delta = 1 - r, has to move as the teacher's flow there: u + delta du/ddelta = v(x_r, r). No sample is ever
noised for that, so that no data is needed, and none of the teacher's samples either. What drifts is corrected by
matching the distributions of noised one-step samples, with a critic that follows the student.

    accelerate launch -m fewstep.trainers.free_flow --teacher DIR --prompts FILE --out OUT

Departures, where what could be read is silent: the critic's rate is the student's, one update each; the share that is
corrected is the end of each micro-batch, whose pre-update samples the critic learns on; the two signals are weighed by
their mean norms in the micro-batch; flow times of step ends are logit-normal, above ``--time_min``. The derivative is a
difference by default: the student sees the length of a step through a smooth module. Any schedule, in rectified flow's
coordinates. One step is all that it can do, and ``--steps`` says so.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.conditioning.ragged import AnyConditioning
from fewstep.critic.denoising import CLEANEST, critic_denoising, sample_log
from fewstep.data.batch import Batch
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.pinned import pinned_under
from fewstep.diffusion.prediction import expand
from fewstep.diffusion.renoising import Renoiser
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.scales import one_number
from fewstep.diffusion.timesteps import logit_normal_times
from fewstep.losses.mean_flow import mean_flow_target, weighted_loss
from fewstep.networks.derivative import derivative_along
from fewstep.networks.flow_map import FlowMapDenoiser, flow_direction, gap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import Role
from fewstep.trainers._free_flow_config import FreeFlowConfig
from fewstep.training.method import Bench, Turn

_TINY = 1e-12


class FreeFlow:
    """The method; see the module. Roles: student and ema (of two times), teacher, critic (with a correction)."""

    Config = FreeFlowConfig

    def __init__(
        self, config: FreeFlowConfig, roles: dict[str, Role], guided_teacher: GuidedDenoiser, sampler: Sampler
    ) -> None:
        config = config.resolved()
        self.config, self.roles, self.sampler, self.schedule = config, roles, sampler, sampler.schedule
        student, scale = roles["student"].denoiser, guided_teacher.guidance_scale
        assert isinstance(student, FlowMapDenoiser)  # it is one network
        self.student, self.teacher = student, guided_teacher
        self.scale = one_number(scale, "the correction") if config.correction and guided_teacher.calls > 1 else 1.0
        # Guidance mixes velocities as it does x0.
        self.flow = guided_teacher.of(roles["teacher"].single.denoiser.velocity)
        self.compared = Renoiser(self.schedule, config.match_min, config.match_max)
        self.learnt = Renoiser(self.schedule, CLEANEST, 1.0)
        ends = self.schedule.flow_time(torch.tensor([0.0, sampler.grid[0]], dtype=torch.float64)).tolist()
        self.lowest, self.highest = max(config.time_min, ends[0]), ends[1]

    @classmethod
    def prepare(cls, config: FreeFlowConfig, bench: Bench) -> FreeFlow:
        """Make the roles: student and critic start as the teacher, or as in --init."""
        config = config.resolved()
        critic = ["critic"] if config.correction else []
        roles = bench.make_flow_map_roles(*critic, differentiated=config.derivative == "exact")
        return cls(config, roles, bench.guided(roles["teacher"]), bench.sampler)

    def learning_rate(self, role: str) -> float:
        """Of the student or the critic."""
        return self.config.learning_rate(role)

    def turns(self, step: int, batch: Batch) -> Iterator[Turn]:
        """The student by both losses on parts of the batch, then the critic on the corrected part."""
        size, (predicted, corrected) = batch.size, self.config.parts(batch.size)
        noise = batch.draws.normal("noise", batch.shape)
        x, t = self.schedule.initial_scale() * noise, self.sampler.times(0, noise)

        # 1. Where steps of all lengths arrive, they go on as the teacher's flow does (prediction loss).
        part = slice(0, predicted)
        conditioning = batch.conditioning.select(list(range(predicted)))
        r = self.ends(batch.draws)[part]
        u, target = self.prediction(x[part], t[part], conditioning, r)
        each = weighted_loss(u, target, "mean", self.config.weight_power, self.config.weight_constant)
        pieces: list[tuple[Tensor, Tensor | None]] = [(each.sum() / size, None)]
        error = (u.detach() - target).flatten(1)
        log = {"student/prediction": each.detach().mean(), "student/velocity_error": error.square().mean()}
        if not corrected:
            yield Turn("student", pieces, log)
            return

        # 2. Samples of one step are drawn from the teacher's distribution (correction loss).
        rest = batch.select(list(range(size - corrected, size)))
        last = slice(size - corrected, size)
        x0 = self.student(x[last], t[last], rest.conditioning, torch.zeros_like(t[last]))
        direction, x0_teacher = self.correction(x0.detach(), rest)
        mean_square = error.square().mean(1)
        weight = 2 / error.shape[1] * (mean_square + self.config.weight_constant) ** -self.config.weight_power
        signal, other = (weight * error.norm(dim=1)).mean(), direction.flatten(1).norm(dim=1).mean()
        scale = self.config.correction_scale * signal / (other + _TINY)
        pieces.append((x0, scale * direction / size))
        log |= {"student/correction": scale.detach()} | sample_log(x0, x0_teacher)
        yield Turn("student", pieces, log)
        pieces.clear()  # the graph is spent; a generator holds none across a yield

        # 3. The critic follows by ordinary denoising, on the same, pre-update samples.
        loss, log = critic_denoising(self.roles["critic"], self.roles["teacher"], x0.detach(), rest, self.learnt)
        yield Turn("critic", [(loss, None)], log)

    def ends(self, draws: Draws) -> Tensor:
        """Where steps end (B,), float64, in the schedule's own time."""
        tau = logit_normal_times(draws.normal("r", ()), self.config.time_mean, self.config.time_std)
        return self.schedule.snap(self.schedule.time_from_flow_time(tau.clamp(self.lowest, self.highest)))

    def prediction(self, x: Tensor, t: Tensor, conditioning: AnyConditioning, r: Tensor) -> tuple[Tensor, Tensor]:
        """u (B, ...) from ``x`` at ``t`` to ``r``, with its graph, and v(x_r, r) - delta du/ddelta (B, ...)."""
        u, delta = self.student.velocity(x, t, conditioning, r), gap(self.schedule, t, r)
        with torch.no_grad():
            here, there = (self.schedule.coefficients(time) for time in (t, r))
            y = x / expand(here.alpha + here.sigma, x) - expand(delta, x) * u
            x_r, noise = y * expand(there.alpha + there.sigma, y), x / self.schedule.initial_scale()
            x_r = pinned_under(noise, conditioning, self.schedule, x_r, r)
            velocity = self.flow(x_r, r, conditioning)
            change = self.change(x, t, conditioning, r, u.detach())
        return u, mean_flow_target(velocity, change, delta)

    def change(self, x: Tensor, t: Tensor, conditioning: AnyConditioning, r: Tensor, u: Tensor) -> Tensor:
        """du/ddelta (B, ...) at a fixed start: longer steps end at cleaner times."""
        if self.config.derivative == "exact":
            _, per_flow_time = flow_direction(x, u, r, self.schedule)

            def ending(end: Tensor) -> Tensor:
                return self.student.velocity(x, t, conditioning, end)

            return derivative_along(ending, (r,), (-per_flow_time,), self.student.network)[1]
        tau, h = self.schedule.flow_time(r), self.config.derivative_step
        other = torch.where(tau - h >= self.lowest, tau - h, tau + h)
        answer = self.student.velocity(x, t, conditioning, self.schedule.time_from_flow_time(other))
        return (answer - u) / expand(tau - other, u)

    @torch.no_grad()
    def correction(self, x0: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The gradient v_teacher - v_critic of the student's ``x0`` (B, ...), and the teacher's x0 (B, ...)."""
        here = self.compared(x0, batch.draws, "matching")
        tau, told = self.schedule.flow_time(here.t), None
        if self.teacher.calls > 1:
            told = torch.where(tau <= self.config.correction_t_max, self.scale, 1.0)
        x0_teacher = self.teacher(here.x_t, here.t, batch.conditioning, guidance_scale=told)
        x0_critic = self.roles["critic"](here.x_t, here.t, batch.conditioning)
        return expand(1 / tau, x0) * (x0_critic - x0_teacher), x0_teacher


if __name__ == "__main__":
    main("free_flow")
