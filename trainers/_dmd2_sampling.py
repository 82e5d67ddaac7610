"""How a DMD2 student comes to the sample that is matched: by its own grid, a drawn one, or from a taught start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from fewstep.critic.first_step import TeacherStart, walk_apart
from fewstep.critic.off_trajectory import OffTrajectory, Walked
from fewstep.data.batch import Batch
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.random_grids import RandomGrid
from fewstep.diffusion.renoising import Renoiser
from fewstep.diffusion.rollout import Sampler, draw_sample
from fewstep.diffusion.timesteps import even_grid
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers._dmd2_config import Dmd2Config


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


#: A sample of a batch, and, in the student's own turn, the terms that belong to how it was made.
Sampling = Callable[[Batch, bool], Sampled]


@dataclass(frozen=True)
class BackwardSimulation:
    """The student's own walk to a step that is drawn (DMD2, §4.5), over its own grid or one that is drawn (CDM).

    Attributes:
        student: that walks.
        sampler: of it.
        grid: the law of drawn grids; None for the sampler's own.
        off_trajectory: the further match beside the walk, if there is one.
        weight: of that.
    """

    student: Denoiser
    sampler: Sampler
    grid: RandomGrid | None = None
    off_trajectory: OffTrajectory | None = None
    weight: float = 0.0

    def __call__(self, batch: Batch, student_turn: bool) -> Sampled:
        sampler = self.sampler
        if self.grid is not None:
            sampler = replace(sampler, grid=self.grid.draw(batch.draws))
        last = batch.draws.shared_integer("student_step", 0, len(sampler.grid))
        inputs: dict[int, Tensor] = {}
        finished = last == len(sampler.grid) - 1
        walk = (self.student, sampler, batch.draws, batch.shape, batch.conditioning, last)
        x0 = draw_sample(*walk, on_step=inputs.__setitem__)
        if self.off_trajectory is None or not student_turn:
            return Sampled(x0, sampler.grid[last], finished, [], {})
        walked = Walked(inputs[last].detach(), sampler.times(last, x0), x0.detach(), sampler.first(last))
        elsewhere, (gradient, log) = self.off_trajectory(walked, batch)
        return Sampled(x0, sampler.grid[last], finished, [(elsewhere, self.weight * gradient)], log)


@dataclass(frozen=True)
class TaughtStart:
    """DP-DMD's: the whole walk, whose first step is taught apart from the others; the match reaches those.

    Attributes:
        student: that walks.
        sampler: of it, of at least two steps, along the ODE.
        start: what its first step is taught.
        weight: of that.
    """

    student: Denoiser
    sampler: Sampler
    start: TeacherStart
    weight: float

    def __call__(self, batch: Batch, student_turn: bool) -> Sampled:
        noise, told, sampler = batch.draws.normal("noise", batch.shape), batch.conditioning, self.sampler
        x0, first = walk_apart(self.student, sampler, noise, told)
        if not student_turn:
            return Sampled(x0, sampler.grid[1], True, [], {})
        x = sampler.initial_scale * noise
        loss = self.start.loss(x, first, self.start.velocity(x, self.start.end(x, told), told))
        log = {"student/first_step": loss.detach()}
        return Sampled(x0, sampler.grid[1], True, [(self.weight * loss, None)], log)


def chosen_sampling(
    config: Dmd2Config,
    student: Denoiser,
    teacher: GuidedDenoiser,
    critic: Denoiser,
    sampler: Sampler,
    compared: Renoiser,
    grid_shift: float,
) -> Sampling:
    """The run's.

    Args:
        config: of the run.
        student: that walks.
        teacher: under guidance.
        critic: as it is.
        sampler: of the student.
        compared: where teacher and critic are compared beside the walk.
        grid_shift: of the teacher's walk, where the student's first step is taught by it.
    """
    if config.diversity_weight > 0:
        grid = even_grid(config.diversity_teacher_steps, grid_shift).tolist()
        times = sampler.grid[0], *[*grid, 0.0][1 : config.diversity_anchor_steps + 1]
        start = TeacherStart(teacher, sampler.schedule, times, sampler.initial_scale)
        return TaughtStart(student, sampler, start, weight=config.diversity_weight)
    random_grid = beside = None
    if config.schedule == "random":
        law = config.schedule_fewest, config.schedule_most, config.schedule_low, config.schedule_high
        random_grid = RandomGrid(sampler.schedule, sampler.grid[0], *law)
    if config.off_trajectory > 0:
        # Where guidance has a term of its own, the match is with the teacher's condition alone.
        matched: Denoiser = teacher if config.decoupled == "none" else teacher.denoiser
        how = config.off_trajectory_input, config.off_trajectory_teacher_time, config.normalizer_min
        beside = OffTrajectory(student, matched, critic, compared, *how)
    return BackwardSimulation(student, sampler, random_grid, beside, config.off_trajectory)
