"""PeRFlow: piecewise rectified flow (Yan et al. 2024, arXiv 2405.07510), a few windows of the time instead of one.

In each window the teacher's ODE, a few steps of it, leads a noised sample from the window's start to its end; the
student learns the straight line between the two. One window is rectified flow, of lines that are made as they are used.

    accelerate launch -m fewstep.trainers.perflow --teacher DIR --prompts FILE --data DIR --steps 4 --out OUT

``--form velocity`` learns the lines' slopes, for teachers of every kind: x_t / (alpha + sigma) moves on straight lines
where x0 is constant, so that DDPM and EDM students keep their teacher's prediction type and stock ODE schedulers walk
their windows, in one step or in several. ``ddim_eps`` and ``diff_eps`` are the released code's forms for tables: the
line is one of x_t, and the network says the noise of the DDIM step through the whole window, or the noise that leads
back; with a step for each window stock DDIM samples both. Guidance is baked in, or kept (``--guidance kept``, the
paper's cfg-sync): the student is then called with ``guidance_scale`` as its teacher is.

Departures: the windows are those of the student's own grid, shifted under flow matching as its times are. The last one
ends at the clean sample, where the released code stops at the table's first entry, and the first begins at the noise
that samplers start from (``--first_window data`` for the released code's start). Networks are told their table's own
times, 999 for the noise, where that code says 1000. diff_eps differs from ddim_eps by a number for each window, so that
a student of either is one that says the noise, and starts as its teacher. The code's own ``velocity`` of tables is not
offered: it is dx_t/dt, which no stock network says. Without ``--data`` samples of the teacher are noised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.conditioning.ragged import AnyConditioning, without_condition
from fewstep.config.checks import settled
from fewstep.data.batch import Batch
from fewstep.diffusion.ode import CLEANEST, solver_step
from fewstep.diffusion.pinned import pinned_under
from fewstep.diffusion.prediction import add_noise, expand, noise_from_x0
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.windows import (
    Window,
    line,
    noise_map,
    noise_of_chord,
    noisy_weight,
    on_chord,
    slope,
    solver_times,
    times_up_to,
    window_at,
    windows_of,
)
from fewstep.losses.consistency import distance
from fewstep.losses.huber import huber_constant
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import Role
from fewstep.sending import sent
from fewstep.trainers._perflow_config import PerFlowConfig
from fewstep.training.method import Bench, Turn


@dataclass(frozen=True)
class Chord:
    """The straight lines through the windows of B samples, and a point on each.

    Attributes:
        window: of each sample.
        t: of the point (B,), float64.
        x_s: where the window begins (B, ...).
        x_e: where the teacher's ODE is at its end.
        x_t: the point.
    """

    window: Window
    t: Tensor
    x_s: Tensor
    x_e: Tensor
    x_t: Tensor


class PerFlow:
    """The method; see the module. Roles: student, teacher, ema if asked for."""

    Config = PerFlowConfig

    def __init__(
        self,
        config: PerFlowConfig,
        roles: dict[str, Role],
        guided_teacher: GuidedDenoiser,
        sampler: Sampler,
        shift: float = 1.0,
    ) -> None:
        config = config.resolved()
        self.config, self.roles, self.sampler, self.schedule = config, roles, sampler, sampler.schedule
        self.student, self.teacher, self.shift = roles["student"], guided_teacher, shift
        self.windows = windows_of(sampler.grid, settled(config.windows))

    @classmethod
    def prepare(cls, config: PerFlowConfig, bench: Bench) -> PerFlow:
        """Make the roles: the student starts as the teacher, or as in --init."""
        config = config.resolved()
        roles, kept = bench.make_roles("student"), config.guidance == "kept"
        teacher = bench.guided(roles["teacher"], 1.0 if kept else None)
        config.refuse_teacher(bench.sampler.schedule, bench.sampler.grid[0], teacher.further > 0)
        method = cls(config, roles, teacher, bench.sampler, bench.shift)
        right = {count: grid for count, grid in bench.grids.items() if method.walks(grid)}
        bench.describe(
            counts=tuple(right), grids=right, trained_at_every_count=config.times == "uniform", guidable=kept
        )
        return method

    def learning_rate(self, role: str) -> float:
        """Of the student."""
        return self.config.lr

    def walks(self, grid: Sequence[float]) -> bool:
        """Whether a grid stops at the edge of every window, where the student's line ends."""
        return all(any(abs(edge - t) < 1e-4 for t in (*grid, 0.0)) for edge in self.windows.edges)

    def turns(self, step: int, batch: Batch) -> Iterator[Turn]:
        """One update of the student in every step (Alg. 1)."""
        # 1. Noised samples at a window's start, where the teacher's ODE leads from there, and a point in between.
        samples = batch.real if self.config.data is not None else batch.pairs
        conditioning = self.conditioning(samples.conditioning, batch)
        noise = batch.draws.normal("noise", batch.shape)
        chord = self.chord(samples.x0, noise, self.times(batch), conditioning)

        # 2. What does the student say of the line there, and what is it?
        said = self.said(self.student(chord.x_t, chord.t, conditioning), chord)
        target = self.target(chord)

        # 3. How far are the two apart?
        loss = self.loss(said, target, chord.t).mean()
        log = {"student/window": loss.detach()}
        log |= {"student/error": (said.detach() - target).square().mean()}
        log |= {"student/said_std": said.detach().std(), "student/target_std": target.std()}
        yield Turn("student", [(loss, None)], log)

    def conditioning(self, conditioning: AnyConditioning, batch: Batch) -> AnyConditioning:
        """Of B samples, of which some lose theirs where the student is to be guided later."""
        if self.config.guidance == "baked" or not self.teacher.further:
            return conditioning
        return without_condition(conditioning, batch.draws.coins("label_drop", self.config.label_drop))

    def times(self, batch: Batch) -> Tensor:
        """Times (B,), float64, at which the student learns."""
        if self.config.times == "grid":
            grid = self.sampler.grid
            return sent(grid, batch.draws.device, torch.float64)[batch.draws.integers("grid_step", 0, len(grid))]
        return self.at(batch.draws.uniform("time"))

    def at(self, uniform: Tensor) -> Tensor:
        """Times (B,), even over all windows, from ``uniform`` draws (B,)."""
        t = times_up_to(self.sampler.grid[0], uniform, self.schedule, self.shift)
        return self.schedule.snap(t.clamp(min=CLEANEST))

    @torch.no_grad()
    def chord(self, x0: Tensor, noise: Tensor, t: Tensor, conditioning: AnyConditioning) -> Chord:
        """The lines through the windows of ``t`` (B,), of noised samples ``x0`` with ``noise`` (B, ...)."""
        window = window_at(self.windows, t)
        x_s = self.start(x0, noise, window)
        times = solver_times(window, self.config.solver_steps, self.schedule, self.shift)
        x_e = self.walk(x_s, times[:-1], times[1:], conditioning, noise)
        return self.joined(window, t, x_s, x_e)

    def start(self, x0: Tensor, noise: Tensor, window: Window) -> Tensor:
        """The noised samples (B, ...) at the windows' starts; in the first one that of the sampler, which has no x0."""
        x_s = add_noise(x0, noise, self.schedule.coefficients(window.start))
        if self.config.first_window == "data":
            return x_s
        first = expand(window.start >= self.sampler.grid[0], x0).bool()
        return torch.where(first, self.sampler.initial_scale * noise, x_s)

    @torch.no_grad()
    def walk(
        self, x: Tensor, now: Sequence[Tensor], then: Sequence[Tensor], conditioning: AnyConditioning, noise: Tensor
    ) -> Tensor:
        """Where the guided teacher's ODE leads from ``x`` (B, ...), by steps from ``now`` to ``then``, times (B,).

        ``noise``: that of ``x``, (B, ...).
        """
        denoise = partial(self.teacher, conditioning=conditioning)
        for begins, ends in zip(now, then, strict=True):
            moved = solver_step(denoise, self.schedule, x, begins, ends, self.config.solver)
            x = pinned_under(noise, conditioning, self.schedule, moved, ends)
        return x

    def joined(self, window: Window, t: Tensor, x_s: Tensor, x_e: Tensor) -> Chord:
        """The lines from ``x_s`` to ``x_e`` (B, ...), and their points at ``t`` (B,)."""
        (scale_s, start), (scale_e, end), (scale_t, at) = self.coordinates(window, t)
        y_t = on_chord(x_s / expand(scale_s, x_s), x_e / expand(scale_e, x_e), start, end, at)
        return Chord(window, t, x_s, x_e, expand(scale_t, y_t) * y_t)

    def coordinates(self, window: Window, t: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Scale and position at the windows' starts and ends and at ``t``."""
        return [line(self.config.form, self.schedule, time) for time in (window.start, window.end, t)]

    def target(self, chord: Chord) -> Tensor:
        """What the student shall say (B, ...): the line's velocity, or its noise."""
        x_s, x_e, window = chord.x_s, chord.x_e, chord.window
        if self.config.form == "velocity":
            (scale_s, start), (scale_e, end), _ = self.coordinates(window, chord.t)
            return slope(x_s / expand(scale_s, x_s), x_e / expand(scale_e, x_e), start, end)
        return noise_of_chord(x_s, x_e, *self.noise_map(self.config.form, window))

    def said(self, x0_student: Tensor, chord: Chord) -> Tensor:
        """The student's x0 (B, ...) at the lines' points, in the words of the target."""
        form, x_t = self.config.form, chord.x_t
        if form == "velocity":
            scale, position = line(form, self.schedule, chord.t)
            return (x_t / expand(scale, x_t) - x0_student) * expand(1 / position, x_t)
        noise = noise_from_x0(x0_student, x_t, self.schedule.coefficients(chord.t))
        if form == "ddim_eps":
            return noise
        (_, ours), (_, theirs) = (self.noise_map(which, chord.window) for which in ("ddim_eps", "diff_eps"))
        return noise * expand(ours / theirs, noise)

    def noise_map(self, form: str, window: Window) -> tuple[Tensor, Tensor]:
        """lam and eta of the windows, each (B,)."""
        start, end = (self.schedule.coefficients(t) for t in (window.start, window.end))
        return noise_map(form, start, end)

    def loss(self, said: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """The weighted distance of each sample (B,), of answers and targets (B, ...) at ``t`` (B,)."""
        c = huber_constant(said[0].numel()) if self.config.huber_c is None else self.config.huber_c
        apart = distance(self.config.distance, said, target, c)
        return apart if self.config.weighting == "uniform" else noisy_weight(t).to(apart.dtype) * apart


if __name__ == "__main__":
    main("perflow")
