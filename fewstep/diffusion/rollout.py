"""The student's trajectory: the one loop that training, sample grids and tests share with the exported pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.pinned import pinned_again, pinned_clean
from fewstep.diffusion.prediction import add_noise, ode_step
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.diffusion.strategic import strategic_step, walk_end
from fewstep.diffusion.timesteps import even_grid
from fewstep.sending import known


@dataclass(frozen=True)
class Sampler:
    """How a student moves: its schedule, its grid and what happens between two steps.

    Attributes:
        schedule: alpha and sigma.
        grid: times in (0, 1], descending, without the final 0.
        renoise: ``"fresh"`` (x0 is noised anew), ``"ode"`` (the implied noise is kept) or ``"tcd"`` (a part of it is).
        initial_scale: the first x_t is this times unit noise.
        gamma: of ``"tcd"``, see :mod:`fewstep.diffusion.strategic`.
    """

    schedule: NoiseSchedule
    grid: tuple[float, ...]
    renoise: str
    initial_scale: float = 1.0
    gamma: float = 0.0

    def __post_init__(self) -> None:
        if self.renoise not in ("fresh", "ode", "tcd"):
            raise ValueError(f"renoise must be 'fresh', 'ode' or 'tcd', not {self.renoise!r}")
        if not self.grid or any(b >= a for a, b in zip(self.grid, self.grid[1:])) or not self.grid[-1] > 0:
            raise ValueError(f"a grid descends and ends above 0, not {self.grid}")

    def move(self, x_t: Tensor, x0: Tensor, t: Tensor, then: Tensor, fresh: Tensor | None) -> Tensor:
        """The sample (B, ...) at the time ``then`` (B,) after ``x0`` was said at ``x_t`` and ``t``.

        ``fresh``: unit noise (B, ...), wanted for ``renoise="fresh"`` and ``"tcd"``.
        """
        if self.renoise == "tcd":
            assert fresh is not None  # as it is wanted here
            return strategic_step(self.schedule, x_t, x0, t, then, self.gamma, fresh)
        there = self.schedule.coefficients(then)
        if self.renoise == "fresh":
            assert fresh is not None  # as it is wanted here
            return add_noise(x0, fresh, there)
        return ode_step(x_t, x0, self.schedule.coefficients(t), there)

    def arrive(self, x_t: Tensor, x0: Tensor, step: int) -> Tensor:
        """Where a walk ends that said ``x0`` at ``x_t`` of ``step``, (B, ...): clean, unless it is TCD's of a table."""
        end = walk_end(self.schedule, self.renoise)
        if end == 0:
            return x0
        t = self.times(step, x_t)
        return ode_step(x_t, x0, self.schedule.coefficients(t), self.schedule.coefficients(torch.full_like(t, end)))

    def first(self, step: int) -> float | None:
        """What unit noise is multiplied with at a walk's first step, None at all others."""
        return self.initial_scale if step == 0 else None

    def times(self, step: int, like: Tensor) -> Tensor:
        """The time of ``step`` for every sample of ``like``: float64 (B,)."""
        size, time = (like.shape[0],), self.grid[step]
        there = torch.full(size, time, dtype=torch.float64, device=like.device)
        return known(there, torch.full(size, time, dtype=torch.float64))


def rollout(
    student: Denoiser,
    sampler: Sampler,
    noise: Tensor,
    conditioning: AnyConditioning,
    step_noise: Callable[[int], Tensor] | None = None,
    last: int | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    gradient_from: int | None = None,
) -> Tensor:
    """Sample x0 (B, ...) from unit ``noise`` (B, ...), with gradient through the last call of the student only.

    With ``last=k`` the loop ends at step k of the grid, whose x0 is returned: DMD2's backward simulation, in which the
    student meets its own inputs and every step learns to give a clean sample (Yin et al. 2024, §4.5). Steps before
    the last run without gradient, unless ``gradient_from`` says otherwise; that one follows the caller's gradient mode.

    Args:
        student: gives x0.
        sampler: grid and rule between steps.
        noise: unit normal.
        conditioning: of B samples.
        step_noise: fresh unit noise (B, ...) for entering step k, needed but for ``renoise="ode"``.
        last: index of the step to stop at, default the grid's last.
        on_step: called with (k, x_t) before each call of the student.
        gradient_from: the first step that follows it, too; 0 for a gradient through all (AnyFlow's rollouts).

    Raises:
        ValueError: ``last`` is no step of the grid.
    """
    last = len(sampler.grid) - 1 if last is None else last
    if not 0 <= last < len(sampler.grid):
        raise ValueError(f"last must be a step of the grid of {len(sampler.grid)}, not {last}")
    x_t = sampler.initial_scale * noise
    return _walk(student, sampler, x_t, conditioning, step_noise, (0, last), on_step, gradient_from)


@torch.no_grad()
def finish(
    student: Denoiser,
    sampler: Sampler,
    x_t: Tensor,
    x0: Tensor,
    step: int,
    conditioning: AnyConditioning,
    step_noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Where a walk ends, (B, ...) without gradient, that said ``x0`` at ``x_t`` (B, ...) of a ``step`` of the grid.

    Args:
        student: gives x0 at the steps that are left.
        sampler: grid and rule between steps.
        x_t: see above.
        x0: see above.
        step: index of the step that was made last.
        conditioning: of B samples.
        step_noise: as in :func:`rollout`.
    """
    last = len(sampler.grid) - 1
    if step == last:
        return pinned_clean(conditioning, sampler.arrive(x_t, x0, step))
    x_t = _moved(sampler, x_t, x0, step, step_noise, conditioning)
    return _walk(student, sampler, x_t, conditioning, step_noise, (step + 1, last), None, None)


def _walk(
    student: Denoiser,
    sampler: Sampler,
    x_t: Tensor,
    conditioning: AnyConditioning,
    step_noise: Callable[[int], Tensor] | None,
    steps: tuple[int, int],
    on_step: Callable[[int, Tensor], None] | None,
    gradient_from: int | None,
) -> Tensor:
    """From ``x_t`` (B, ...) at the first of these ``steps`` to where the walk ends that stops at the last."""
    first, last = steps
    for step in range(first, last):
        followed = gradient_from is not None and step >= gradient_from
        with nullcontext() if followed else torch.no_grad():
            if on_step is not None:
                on_step(step, x_t)
            x0 = ask_at(student, sampler, step, x_t, conditioning)
            x_t = _moved(sampler, x_t, x0, step, step_noise, conditioning)
    if on_step is not None:
        on_step(last, x_t)
    return pinned_clean(conditioning, sampler.arrive(x_t, ask_at(student, sampler, last, x_t, conditioning), last))


def _moved(
    sampler: Sampler,
    x_t: Tensor,
    x0: Tensor,
    step: int,
    step_noise: Callable[[int], Tensor] | None,
    conditioning: AnyConditioning,
) -> Tensor:
    """The sample (B, ...) at the step after ``step``, where ``x0`` was said at ``x_t``."""
    fresh = None
    if sampler.renoise != "ode":
        assert step_noise is not None  # as it is needed here
        fresh = step_noise(step + 1)
    return jump(sampler, x_t, x0, step, sampler.times(step + 1, x_t), fresh, conditioning)


def jump(
    sampler: Sampler,
    x_t: Tensor,
    x0: Tensor,
    step: int,
    then: Tensor,
    fresh: Tensor | None,
    conditioning: AnyConditioning,
) -> Tensor:
    """The sample (B, ...) at any time ``then`` (B,) after ``x0`` was said at ``x_t`` of a ``step`` of the grid.

    ``fresh``: as :meth:`Sampler.move` has it.
    """
    t = sampler.times(step, x_t)
    moved = sampler.move(x_t, x0, t, then, fresh)
    return pinned_again(conditioning, sampler.schedule, x_t, t, moved, then, sampler.first(step))


def ask_at(student: Denoiser, sampler: Sampler, step: int, x_t: Tensor, conditioning: AnyConditioning) -> Tensor:
    """x0 (B, ...) of ``x_t`` at a step of the grid, which ends at the next one, or at the clean sample."""
    t = sampler.times(step, x_t)
    end = sampler.times(step + 1, x_t) if step + 1 < len(sampler.grid) else torch.zeros_like(t)
    return student(x_t, t, conditioning, end=end)


def shortcut(grid: Sequence[float], place: int, segments: int = 3) -> tuple[float, ...]:
    """The times at which a walk along ``grid`` (N,) starts its steps when all but one of them are taken together.

    They are q_0 -> q_place -> q_(place + 1) -> 0, empty steps left out: what lies before that step is one, and what
    comes after it (AnyFlow, arXiv 2605.13724). Of two ``segments`` the latter two are one; of one, everything is.

    Raises:
        ValueError: ``place`` is no step of the grid, or not one to three segments are asked for.
    """
    if not 0 <= place < len(grid) or not 1 <= segments <= 3:
        raise ValueError(f"a shortcut has 1 to 3 segments around a step of its {len(grid)}, not {segments} at {place}")
    starts = {0, *(place, place + 1)[: segments - 1]} - {len(grid)}
    return tuple(grid[start] for start in sorted(starts))


def draw_sample(
    student: Denoiser,
    sampler: Sampler,
    draws: Draws,
    shape: Sequence[int],
    conditioning: AnyConditioning,
    last: int | None = None,
    *,
    prefix: str = "",
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """:func:`rollout` from keyed draws: ``<prefix>noise`` and, on the way, ``<prefix>step_noise_<k>``.

    Args:
        student: gives x0.
        sampler: grid and rule between steps.
        draws: of B samples.
        shape: of one sample.
        conditioning: of B samples.
        last: index of the step to stop at, default the grid's last.
        prefix: of the draws' names, where a step samples twice.
        on_step: as in :func:`rollout`.
    """

    def step_noise(k: int) -> Tensor:
        return draws.normal(f"{prefix}step_noise_{k}", shape)

    noise = draws.normal(f"{prefix}noise", shape)
    return rollout(student, sampler, noise, conditioning, step_noise, last, on_step)


def ode_sampler(schedule: NoiseSchedule, steps: int) -> Sampler:
    """An Euler walk of ``steps`` even steps, for looking at a teacher."""
    return Sampler(schedule, tuple(even_grid(steps).tolist()), "ode", schedule.initial_scale())
