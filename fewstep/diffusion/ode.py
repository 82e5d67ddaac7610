"""Solving the probability-flow ODE: a teacher's samples from noise, the noise of real samples, and the straightness.

x_t is divided by a scale so that a constant x0 means a straight line at constant speed, and the line's slope is then
(y - x0) / position, where the position says how far along the line a time lies. Two such coordinates are in use:

========  =============  =========================  ==========================================
line      scale          position                   slope
========  =============  =========================  ==========================================
"flow"    alpha + sigma  sigma / (alpha + sigma)    noise - x0 (rectified flow)
"edm"     alpha          sigma / alpha              noise (Karras et al. 2022, Alg. 1; DDIM)
========  =============  =========================  ==========================================

An Euler step is the same in both (and is :func:`fewstep.diffusion.prediction.ode_step`); a Heun step is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.pinned import pinned_again, pinned_clean
from fewstep.diffusion.prediction import add_noise, expand
from fewstep.diffusion.schedule import EDMSchedule, NoiseSchedule
from fewstep.diffusion.timesteps import even_grid

SOLVERS = ("euler", "heun")
#: Where a walk from data to noise begins: at t = 0 itself a network says nothing about the noise.
CLEANEST = 1e-3
# A position up to here is the clean sample but for rounding.
_CLEAN = 1e-12


class OdeSolver:
    """Steps of one denoiser along the ODE, by its slopes at single times: it is told no step's end.

    Args:
        denoiser: says x0.
        schedule: alpha and sigma.
        solver: ``"euler"`` or ``"heun"``, which asks once more at each step's end and takes the mean of both slopes.
        line: the coordinates, see the module; default: ``"edm"`` under an EDM schedule, else ``"flow"``.
        anchor: unit noise (B, ...) that every next x_t is mixed with in place of the noise implied by the walk: the
            sampler of 2-rectified flow++, which on straight paths is the same, and on others lets no error add up.

    Raises:
        ValueError: unknown solver or line.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        solver: str = "euler",
        line: str | None = None,
        anchor: Tensor | None = None,
    ) -> None:
        line = line or default_line(schedule)
        if solver not in SOLVERS or line not in ("flow", "edm"):
            raise ValueError(f"solver is {' or '.join(SOLVERS)} and line is flow or edm, not {solver!r} and {line!r}")
        self.denoiser, self.schedule, self.solver, self.line, self.anchor = denoiser, schedule, solver, line, anchor

    def to_data(
        self,
        x: Tensor,
        times: Sequence[float],
        conditioning: AnyConditioning,
        on_step: Callable[[float, Tensor], None] | None = None,
    ) -> Tensor:
        """x0 (B, ...) from ``x`` (B, ...) at ``times[0]``, by ``times`` (descending, without a final 0).

        The last step is one of Euler to the clean sample. ``on_step`` is called with (t, x_t) before each step. Where a
        pipeline pins a part of its samples, a walk from the top begins with the noise of that part alone.
        """
        first = self.schedule.initial_scale() if times[0] >= 1 else None
        for now, then in pairwise(times):
            if on_step is not None:
                on_step(now, x)
            moved = self.step(x, now, then, conditioning)
            x = pinned_again(conditioning, self.schedule, x, _full(now, x), moved, _full(then, x), first)
            first = None
        if on_step is not None:
            on_step(times[-1], x)
        return pinned_clean(conditioning, self.denoiser(x, _full(times[-1], x), conditioning))

    def to_noise(self, x: Tensor, times: Sequence[float], conditioning: AnyConditioning) -> Tensor:
        """x_t (B, ...) at the last of ``times`` (ascending, above 0) from ``x`` at the first."""
        for now, then in pairwise(times):
            x = self.step(x, now, then, conditioning)
        return x

    def step(self, x: Tensor, now: float, then: float, conditioning: AnyConditioning) -> Tensor:
        """From time ``now`` to time ``then``, in either direction, neither of them 0; (B, ...)."""
        denoise = partial(self.denoiser, conditioning=conditioning)
        return solver_step(
            denoise, self.schedule, x, _full(now, x), _full(then, x), self.solver, line=self.line, anchor=self.anchor
        )


def solver_step(
    denoise: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    x_t: Tensor,
    now: Tensor,
    then: Tensor,
    solver: str,
    *,
    line: str | None = None,
    anchor: Tensor | None = None,
) -> Tensor:
    """One step of the ODE from ``now`` to ``then``, in either direction; x_t and the result: (B, ...).

    A Heun step that ends at the clean sample is one of Euler: there a network says nothing about the noise.

    Args:
        denoise: x0 (B, ...) at (x_t, t).
        schedule: alpha and sigma.
        x_t: where the step begins.
        now: its time (B,), above 0.
        then: where it ends, (B,).
        solver: see :class:`OdeSolver`, as ``line`` and ``anchor``.
        line: likewise.
        anchor: likewise.
    """
    line = line or default_line(schedule)
    scale, start = _coordinates(schedule, line, now, x_t)
    next_scale, end = _coordinates(schedule, line, then, x_t)
    y = x_t / scale

    def along(slope: Tensor) -> Tensor:
        if anchor is not None:
            return add_noise(y - start * slope, anchor, schedule.coefficients(then))
        return (y + (end - start) * slope) * next_scale

    slope = (y - denoise(x_t, now)) / start
    if solver == "heun":
        there = along(slope)
        again = (there / next_scale - denoise(there, then)) / end.clamp(min=_CLEAN)
        slope = torch.where(end > _CLEAN, (slope + again) / 2, slope)
    return along(slope)


def default_line(schedule: NoiseSchedule) -> str:
    """The coordinates of a schedule's own paper, see the module."""
    return "edm" if isinstance(schedule, EDMSchedule) else "flow"


def teacher_times(schedule: NoiseSchedule, steps: int, shift: float = 1.0) -> list[float]:
    """The times at which a teacher is asked on its way from noise to data, descending, without a final 0.

    Even, shifted by ``shift`` under flow matching, at entries of a table; under EDM the ramp of Karras et al. 2022
    (Eq. 5), whose last time is sigma_min.
    """
    if isinstance(schedule, EDMSchedule):
        return torch.linspace(1, 0, steps, dtype=torch.float64).tolist()
    return schedule.snap(even_grid(steps, shift)).tolist()


def inversion_times(schedule: NoiseSchedule, steps: int, shift: float = 1.0) -> list[float]:
    """The way back, ascending from :data:`CLEANEST` to the top: ``steps`` steps, one less under EDM."""
    cleanest = float(schedule.snap(torch.tensor([CLEANEST], dtype=torch.float64)))
    upwards = [t for t in reversed(teacher_times(schedule, steps, shift)) if t > cleanest]
    return [cleanest, *upwards]


@torch.no_grad()
def straightness(
    denoiser: Denoiser, schedule: NoiseSchedule, times: Sequence[float], x: Tensor, conditioning: AnyConditioning
) -> Tensor:
    """How far the paths are from straight lines: mean |(start - end) - velocity|^2 of an entry; () and 0 if straight.

    In the coordinates of rectified flow, along the denoiser's own Euler walk by ``times`` (descending, without a final
    0) from ``x`` (B, ...) at ``times[0]``; start - end is divided by the flow time between them.
    Source: Liu et al. 2022, §2.2, S(Z).
    """
    coordinates = [_coordinates(schedule, "flow", _full(t, x), x) for t in times]
    ends = [position for _, position in coordinates[1:]] + [torch.zeros_like(coordinates[0][1])]
    y = start = x / coordinates[0][0]
    velocities = []
    for t, (scale, position), end in zip(times, coordinates, ends):
        velocities.append((y - denoiser(y * scale, _full(t, x), conditioning)) / position)
        y = y + (end - position) * velocities[-1]
    span = coordinates[0][1]
    chord = (start - y) / span
    shares = [(position - end) / span for (_, position), end in zip(coordinates, ends)]
    parts = ((share * (chord - velocity).square()).mean() for share, velocity in zip(shares, velocities))
    return sum(parts, start=x.new_zeros(()))


def _coordinates(schedule: NoiseSchedule, line: str, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and position at ``t`` (B,), shaped to broadcast over ``like``."""
    alpha, sigma = schedule.coefficients(t)
    scale = alpha + sigma if line == "flow" else alpha
    return expand(scale, like), expand(sigma / scale, like)


def _full(t: float, like: Tensor) -> Tensor:
    return torch.full((like.shape[0],), t, dtype=torch.float64, device=like.device)
