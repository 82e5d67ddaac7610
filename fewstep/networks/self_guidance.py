"""Guidance that a student of two times trains into itself, where real images are the teacher (MeanFlow, §4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning, without_condition
from fewstep.diffusion.prediction import expand
from fewstep.networks.flow_map import FlowMapDenoiser
from fewstep.sending import sent


@dataclass(frozen=True)
class SelfGuidance:
    """The velocity of data, guided by the student's own.

    Attributes:
        student: asked for its velocities at one time.
        omega: weight of the data's velocity.
        kappa: weight of the student's own.
        low: flow time below which nothing is guided.
        high: and above which.
    """

    student: FlowMapDenoiser
    omega: float
    kappa: float
    low: float = 0.0
    high: float = 1.0

    @torch.no_grad()
    def __call__(
        self, velocity: Tensor, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, dropped: Sequence[bool]
    ) -> tuple[Tensor, AnyConditioning]:
        """The guided velocity (B, ...), and the conditioning of B samples of which some are ``dropped``.

        Who has no condition is not guided, so that the student knows that flow too.
        """
        conditioning = without_condition(conditioning, dropped)
        flow_time = self.student.schedule.flow_time(t)
        inside = (flow_time >= self.low) & (flow_time <= self.high)
        inside &= ~sent(dropped, t.device, torch.bool)
        mixed = self.mix(velocity, x_t, t, conditioning)
        return torch.where(expand(inside, x_t).bool(), mixed, velocity), conditioning

    def mix(self, velocity: Tensor, x_t: Tensor, t: Tensor, conditioning: AnyConditioning) -> Tensor:
        """omega v + kappa u(x_t, t, t, c) + (1 - omega - kappa) u(x_t, t, t, null), (B, ...) (MeanFlow, Eq. 20).

        The null condition is each sample's own last further answer.
        Where u is this, it is the flow guided by omega / (1 - kappa).
        """
        mixed = self.omega * velocity
        if self.kappa:
            mixed = mixed + self.kappa * self.student.velocity(x_t, t, conditioning, t)
        return mixed + (1 - self.omega - self.kappa) * self.student.velocity(x_t, t, conditioning.others[-1], t)
