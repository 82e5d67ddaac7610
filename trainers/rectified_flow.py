"""Rectified flow (Liu et al. 2022, arXiv 2209.03003): straight lines between noise and the teacher's samples.

With 2-rectified flow++ (Lee et al. 2024, arXiv 2405.20320): reflow of any teacher, and distillation of a reflowed one
to a few steps. Every pair is a noise and the sample that the teacher's ODE makes of it. The student learns the constant
velocity of the straight line between them, so that its own ODE needs few steps, or one.

    accelerate launch -m fewstep.trainers.rectified_flow --teacher DIR --prompts FILE --steps 1 --out OUT

Pairs are made ahead with ``fewstep pairs`` and given as ``--pairs``, or made at the start; real images (``--data``)
join them with the noise that the teacher's ODE leads them to. The third rectified flow and distillation (``--times
grid``) are runs whose ``--teacher`` is the student of the one before, at ``--guidance_scale 1``.

DDPM and EDM teachers: x_t / (alpha + sigma) moves on rectified flow's straight line in every family of schedules. So
the student stays in its teacher's schedule and prediction type: that is the conversion by equal signal-to-noise ratio,
exact, and stock ODE schedulers carry it. A table stops short of pure noise, and the line with it: it ends in the x_t
that samplers start from, at the last entry, where the paper asks the network beyond what it was trained at.

Other departures: times end at ``--time_min`` (papers: 0 and 1e-5), no dropout (roles run in eval mode), pairs keep
their floats (2-rectified flow++: 8-bit images), and the Huber constant has the root that was meant
(``--huber_scaling released`` is what the released code does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.data.batch import Batch, Pairs
from fewstep.diffusion.prediction import add_noise, noise_from_x0
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.timesteps import logit_normal_times, u_shaped_times, uniform_times
from fewstep.losses.flow import squared, velocity_error
from fewstep.losses.huber import huber_constant, pseudo_huber
from fewstep.networks.roles import Role
from fewstep.sending import sent
from fewstep.trainers._rectified_flow_config import RectifiedFlowConfig
from fewstep.training.method import Bench, Turn


class RectifiedFlow:
    """The method; see the module. Roles: student, teacher (asked for pairs and pictures only), ema if asked for.

    Args:
        config: of the run.
        roles: by name.
        sampler: the student's.
        perceptual: the distance (B,) of two batches x0, with gradient to the first.
    """

    Config = RectifiedFlowConfig

    def __init__(
        self,
        config: RectifiedFlowConfig,
        roles: dict[str, Role],
        sampler: Sampler,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        config = config.resolved()
        self.config, self.roles, self.sampler, self.perceptual = config, roles, sampler, perceptual
        self.student, self.schedule = roles["student"], sampler.schedule
        # Flow times run from 0 to 1 under flow matching; under a table and EDM they end where the student starts.
        ends = self.schedule.flow_time(torch.tensor([0.0, sampler.grid[0]], dtype=torch.float64)).tolist()
        self.lowest, self.highest = max(config.time_min, ends[0]), ends[1]

    @classmethod
    def prepare(cls, config: RectifiedFlowConfig, bench: Bench) -> RectifiedFlow:
        """Make the roles: the student starts as the teacher, or as in --init."""
        config = config.resolved()
        perceptual = bench.perceptual_distance() if config.perceptual_weight else None
        roles = bench.make_roles("student")
        return cls(config, roles, bench.sampler, perceptual)

    def learning_rate(self, role: str) -> float:
        """Of the student."""
        return self.config.lr

    def turns(self, step: int, batch: Batch) -> Iterator[Turn]:
        """The student learns the velocity of the lines between the ends of the pairs (Liu et al. 2022, Eq. 1)."""
        # 1. The noise at the other end of the line, and a point on it.
        x0, noise = batch.pairs.x0, self.line_noise(batch.pairs)
        t = self.times(batch)
        x_t = add_noise(x0, noise, self.schedule.coefficients(t))

        # 2. Where does the student see the line's end?
        x0_student = self.student(x_t, t, batch.pairs.conditioning)

        # 3. An error of x0 is one of the velocity, the nearer to the end the greater.
        loss, log = self.distance(x0, x0_student, self.schedule.flow_time(t))
        yield Turn("student", [(loss, None)], log)

    def line_noise(self, pairs: Pairs) -> Tensor:
        """The noise (B, ...) of the line that ends in the student's first x_t: the pair's own under flow matching.

        A table's x_t at its noisiest entry holds a trace of x0, and the sampler starts from unit noise all the same.
        With this noise the line meets that start, and a student that is right at every step walks along it.
        """
        start = self.schedule.coefficients(self.sampler.times(0, pairs.x0))
        return noise_from_x0(pairs.x0, self.sampler.initial_scale * pairs.noise, start)

    def times(self, batch: Batch) -> Tensor:
        """Times (B,), float64, at which the student learns; drawn as flow times, and snapped to a table's entries."""
        if self.config.times == "grid":
            grid = sent(self.sampler.grid, batch.pairs.x0.device, torch.float64)
            return grid[batch.draws.integers("grid_step", 0, len(grid))]
        if self.config.times == "logit_normal":
            share = logit_normal_times(batch.draws.normal("time", ()))
        elif self.config.times == "u_shaped":
            share = u_shaped_times(batch.draws.uniform("time"), self.config.u_steepness)
        else:
            share = batch.draws.uniform("time")
        flow_time = uniform_times(share, self.lowest, self.highest)
        return self.schedule.snap(self.schedule.time_from_flow_time(flow_time))

    def distance(self, x0: Tensor, x0_student: Tensor, flow_time: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () at ``flow_time`` (B,), and what to log; ``x0``, ``x0_student``: (B, ...)."""
        config = self.config
        error = velocity_error(x0, x0_student, flow_time)
        mean_square = squared(error)
        if config.loss == "huber":
            entries = x0[0].numel()
            c = huber_constant(entries, config.huber_factor, config.huber_scaling)
            distance = pseudo_huber(error, c) / entries  # as in 2-rectified flow++, which takes means over a sample
        else:
            distance = mean_square
        if config.time_weight == "1-t":
            distance = (1 - flow_time).to(distance) * distance
        log = {"student/flow": distance.mean().detach(), "student/velocity_error": mean_square.mean().detach()}
        log |= {"student/x0_std": x0_student.detach().std(), "student/teacher_std": x0.std()}
        if self.perceptual is not None:
            perceptual = self.perceptual(x0_student, x0)
            if config.perceptual_over_t:
                perceptual = perceptual / flow_time.to(perceptual)
            distance = distance + config.perceptual_weight * perceptual
            log["student/perceptual"] = perceptual.mean().detach()
        return distance.mean(), log


if __name__ == "__main__":
    main("rectified_flow")
