"""A network as TrigFlow's F, whatever its own schedule, and how F changes along a trajectory.

The network stays in its own schedule (:mod:`fewstep.diffusion.trig_flow`). What is asked for is cos sin dF / d angle,
the change by log(sigma / alpha): nothing in it grows beyond bounds (sCM, arXiv 2410.11081, §4.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.diffusion.prediction import add_noise, expand
from fewstep.diffusion.schedule import Coefficients, TableSchedule
from fewstep.diffusion.trig_flow import TrigFlow
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.derivative import derivative_along

#: How a derivative is taken: by forward-mode differentiation or by differences of a step in the angle.
DERIVATIVES = ("exact", "semi_continuous", "discrete", "backward", "central", "renoise")
#: For who has no forward derivative.
ADVICE = "take --derivative discrete"
# Where TrigFlow's sample is followed no further, as FastGen has it.
_NOISIEST = math.pi / 2 - 1e-5


class Point(NamedTuple):
    """A place on a trajectory.

    Attributes:
        x_t: in the schedule (B, ...).
        t: in its time (B,).
        conditioning: of B samples.
        direction: dy / d angle (B, ...) of TrigFlow's sample y.
    """

    x_t: Tensor
    t: Tensor
    conditioning: AnyConditioning
    direction: Tensor


@dataclass(frozen=True)
class TrigFlowNetwork:
    """F of a network.

    Attributes:
        denoiser: the network in its own schedule.
        trig: TrigFlow beside that schedule.
        kind: of :data:`DERIVATIVES`. ``exact``; ``semi_continuous``: exact in space, a difference in time;
            ``discrete``: a difference along the ODE, by a rotation (both rCM's); ``backward``: the same by an Euler
            step in the angle; ``central``: of two such steps; ``renoise``: between two other angles of the same x0 and
            noise (FastGen's).
        step: of the differences, an angle; of ``renoise`` a share of the angle. Under a table ``discrete`` goes to an
            entry of it, at least one further.
    """

    denoiser: NetworkDenoiser
    trig: TrigFlow
    kind: str = "exact"
    step: float = 1e-4

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
        """F (B, ...) at ``x_t`` (B, ...) and ``t`` (B,); ``end`` is ignored."""
        return self.trig.output(self.denoiser.raw(x_t, t, conditioning), self.denoiser.prediction_type, x_t, t)

    def derivative(self, at: Point, output: Tensor | None = None) -> Tensor:
        """cos sin dF / d angle (B, ...) along the trajectory through ``at``, without a graph.

        ``output``: F there (B, ...), where it is known; some differences ask for it otherwise.

        Raises:
            UserError: ``exact`` of a network with an operation that has no forward derivative.
        """
        with torch.no_grad():
            if self.kind == "exact":
                return self._exact(at)
            angle = self.trig.angle(at.t)
            rate = expand(angle.cos() * angle.sin(), at.x_t)
            if self.kind == "renoise":
                return rate * self._renoised(at, angle)
            if self.kind == "central":
                step = torch.full_like(angle, self.step)
                ahead, behind = (self._along(at, angle + way * step, way * self.step) for way in (1, -1))
                return rate * (ahead - behind) / (2 * self.step)
            output = self(at.x_t, at.t, at.conditioning) if output is None else output.detach()
            if self.kind == "backward":
                return rate * (output - self._along(at, angle - self.step, -self.step)) / self.step
            then = self._earlier(at.t, angle)
            gap = angle - self.trig.angle(then)
            cos, sin = expand(gap.cos(), at.x_t), expand(gap.sin(), at.x_t)
            y = self.trig.sample(at.x_t, at.t)
            if self.kind == "semi_continuous":
                earlier = self(self.trig.moved(y, then), then, at.conditioning)
                return self._exact(at, still=True) + rate * (cos * output - earlier) / sin
            rotated = cos * y - sin * at.direction
            return rate * (cos * output - self(self.trig.moved(rotated, then), then, at.conditioning)) / sin

    def _exact(self, at: Point, still: bool = False) -> Tensor:
        """By forward mode, all of it or, where the time stands ``still``, what comes of y alone."""
        schedule, sigma_data = self.trig.schedule, self.trig.sigma_data
        (alpha, sigma), rates, scale = schedule.coefficients(at.t), schedule.derivatives(at.t), self.trig.scale(at.t)
        # Both per unit of log(sigma / alpha). x_t = scale y changes by the way of y, and by its scale.
        t_change = torch.zeros_like(alpha) if still else alpha * sigma / (rates.sigma * alpha - sigma * rates.alpha)
        grows = t_change * (alpha * rates.alpha + sigma * rates.sigma / sigma_data**2) / scale**2
        moves = alpha * sigma / (sigma_data * scale)
        x_change = expand(grows, at.x_t) * at.x_t + expand(moves, at.x_t) * at.direction

        def output(x_t: Tensor, t: Tensor) -> Tensor:
            return self(x_t, t, at.conditioning)

        return derivative_along(output, (at.x_t, at.t), (x_change, t_change), self.denoiser.network, ADVICE)[1]

    def _along(self, at: Point, angle: Tensor, way: float) -> Tensor:
        """F (B, ...) where a step of ``way`` along the direction leads."""
        t = self.trig.time(angle)
        y = self.trig.sample(at.x_t, at.t) + way * at.direction
        return self(self.trig.moved(y, t), t, at.conditioning)

    def _earlier(self, t: Tensor, angle: Tensor) -> Tensor:
        """The time (B,) one step before ``t``."""
        schedule = self.trig.schedule
        then = self.trig.time((angle - self.step).clamp(min=1e-6))
        if not isinstance(schedule, TableSchedule) or self.kind != "discrete":
            return then
        entry = 1 / schedule.num_train_timesteps
        return torch.minimum(schedule.snap(then), t - entry).clamp(min=entry)

    def _renoised(self, at: Point, angle: Tensor) -> Tensor:
        """dF / d angle (B, ...) between two angles of the same x0 and noise, which follow from y and the direction."""
        angle = angle.clamp(max=_NOISIEST)
        y, direction = self.trig.sample(at.x_t, at.t), at.direction
        cos, sin = expand(angle.cos(), y), expand(angle.sin(), y)
        x0, z = cos * y - sin * direction, sin * y + cos * direction
        step = (self.step * angle).clamp(min=1e-6)

        def there(angle: Tensor) -> Tensor:
            t = self.trig.time(angle)
            y = add_noise(x0, z, Coefficients(angle.cos(), angle.sin()))
            return self(self.trig.moved(y, t), t, at.conditioning)

        ahead, behind = there((angle + step).clamp(max=_NOISIEST)), there(angle - step)
        return (ahead - behind) / expand(2 * step, y)
