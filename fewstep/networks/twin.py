"""A student at signed times: below zero it is the flow that ends at its own samples, TwinFlow's twin trajectory.

One network says both velocities. What tells them apart is the module of the second time, which is told a negative
number there; it starts as nothing at all, so that both are the teacher's at first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.ragged import AnyConditioning, in_groups
from fewstep.diffusion.prediction import expand, to_velocity
from fewstep.networks.flow_map import FlowMapDenoiser


class TwinDenoiser:
    """A student of two times in rectified flow's coordinates y = x_t / (alpha + sigma), at signed flow times.

    Args:
        student: the network that is asked.
        low: the cleanest flow time that it knows.
        high: and the noisiest.
    """

    def __init__(self, student: FlowMapDenoiser, low: float, high: float) -> None:
        self.student, self.schedule = student, student.schedule
        self.low, self.high = low, high

    def __call__(self, y: Tensor, t: Tensor, r: Tensor, conditioning: AnyConditioning) -> Tensor:
        """The average velocity (B, ...) between r and t; that of the twin where t is negative, which is r there.

        Args:
            y: (B, ...).
            t: (B,), float64, in [-high, high] and not 0.
            r: (B,), between 0 and t.
            conditioning: of B samples.
        """
        told = torch.where(t < 0, t - 1, t - r)
        x_t, own = self.own(y, t.abs())
        raw = in_groups(self._told, x_t, own, conditioning, told)
        return to_velocity(raw, self.student.prediction_type, x_t, self.schedule, own)

    def own(self, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t (B, ...) and the schedule's own time (B,) of ``y`` at flow times ``t`` in [low, high]."""
        own = self.schedule.snap(self.schedule.time_from_flow_time(t))
        alpha, sigma = self.schedule.coefficients(own)
        return expand(alpha + sigma, y) * y, own

    def known(self, t: Tensor) -> Tensor:
        """The nearest flow time (B,) at which the network was trained."""
        return self.schedule.flow_time(
            self.schedule.snap(self.schedule.time_from_flow_time(t.clamp(self.low, self.high)))
        )

    def _told(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, told: Tensor | None) -> Tensor:
        assert told is not None  # it is given above
        return self.student.told(x_t, t, conditioning, told)
