"""A first step that follows the teacher's own path, for the sake of diversity (DP-DMD, arXiv 2602.03139).

Which picture a noise becomes is decided early. Distribution matching may let many noises become one picture; a first
step that is taught by the teacher's path from the same noise keeps them apart, and only what comes after is matched.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.conditioning.outside import pins_of
from fewstep.conditioning.ragged import AnyConditioning
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.ode import OdeSolver
from fewstep.diffusion.pinned import pinned_under
from fewstep.diffusion.prediction import expand
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.kernels.error_sums import error_sums


class FirstStepApart:
    """A student whose first answer of a walk is kept with its gradient, and goes on without; itself a denoiser."""

    def __init__(self, student: Denoiser) -> None:
        self.student = student
        self._first: Tensor | None = None

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
        """x0 (B, ...)."""
        x0 = self.student(x_t, t, conditioning, end=end)
        if self._first is not None:
            return x0
        self._first = x0
        return x0.detach()

    @property
    def first(self) -> Tensor:
        """The first answer, x0 (B, ...)."""
        assert self._first is not None  # a walk has a step
        return self._first


def walk_apart(student: Denoiser, sampler: Sampler, noise: Tensor, told: AnyConditioning) -> tuple[Tensor, Tensor]:
    """x0 (B, ...) at the end of the student's ODE walk from unit ``noise`` (B, ...), and what its first step said.

    The gradient of the end passes through all steps but the first, and that of the first answer through that alone.
    """
    apart = FirstStepApart(student)
    end = rollout(apart, sampler, noise, told, gradient_from=0)
    return end, apart.first


@dataclass(frozen=True)
class TeacherStart:
    """The teacher's path from noise, as one step would go there.

    Attributes:
        teacher: under guidance.
        schedule: alpha and sigma.
        times: of its first Euler steps and where the last of them ends, descending; the last may be 0.
        initial_scale: at the first time x is this times unit noise.
    """

    teacher: Denoiser
    schedule: NoiseSchedule
    times: tuple[float, ...]
    initial_scale: float = 1.0

    @torch.no_grad()
    def end(self, x: Tensor, conditioning: AnyConditioning) -> Tensor:
        """Where the teacher's steps lead from ``x`` at the first time, (B, ...)."""
        solver, noise = OdeSolver(self.teacher, self.schedule), x / self.initial_scale
        for now, then in pairwise(self.times):
            if then == 0:
                return solver.to_data(x, [now], conditioning)
            moved = solver.step(x, now, then, conditioning)
            there = torch.full((len(x),), then, dtype=torch.float64, device=x.device)
            x = pinned_under(noise, conditioning, self.schedule, moved, there)
        return x

    @torch.no_grad()
    def velocity(self, x: Tensor, end: Tensor, conditioning: AnyConditioning) -> Tensor:
        """The mean of noise - x0 along the path from ``x`` to ``end`` (B, ...), in rectified flow's coordinates.

        (y_1 - y_K) / (tau_1 - tau_K) with y = x_t / (alpha + sigma) and tau = sigma / (alpha + sigma). Where a pipeline
        pins a part of its samples it is that of the line to the picture, which every student says.
        """
        ends = torch.tensor([self.times[0], self.times[-1]], dtype=torch.float64, device=x.device)
        alpha, sigma = self.schedule.coefficients(ends)
        scale, tau = 1 / (alpha + sigma), sigma / (alpha + sigma)
        velocity = (x * scale[0].to(x) - end * scale[1].to(x)) / (tau[0] - tau[1]).to(x)
        if (pins := pins_of(conditioning)) is None:
            return velocity
        return torch.where(pins.where, (x * scale[0].to(x) - pins.value.to(x)) / tau[0].to(x), velocity)

    def loss(self, x: Tensor, x0: Tensor, velocity: Tensor, weight: Tensor | None = None) -> Tensor:
        """mean((v - velocity)^2) (), of the velocity v that a student that says ``x0`` at ``x`` takes; all (B, ...).

        ``weight``: (B,), default 1.
        """
        t = torch.full((len(x),), self.times[0], dtype=torch.float64, device=x.device)
        alpha, sigma = self.schedule.coefficients(t)
        y, tau = x * expand(1 / (alpha + sigma), x), sigma / (alpha + sigma)
        each = error_sums((y - x0) * expand(1 / tau, x), velocity) / x[0].numel()
        return (each if weight is None else weight.to(each) * each).mean()
