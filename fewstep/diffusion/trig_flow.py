"""TrigFlow (Lu & Song 2024, sCM, arXiv 2410.11081, §3) under any schedule: the same sample at the same noise level.

TrigFlow's sample is y = cos(angle) x0 + sin(angle) z, its noise z of the standard deviation sigma_data. A schedule's
sample of equal sigma / alpha is x_t = scale y with tan(angle) = sigma / (alpha sigma_data). So a network stays in its
own schedule, and F, with dy / d angle = sigma_data F along the ODE, is a combination of x_t and its raw output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.prediction import expand, velocity_map
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.kernels.guided_x0 import guided_x0


@dataclass(frozen=True)
class TrigFlow:
    """TrigFlow beside a schedule.

    Attributes:
        schedule: of x_t and of times.
        sigma_data: standard deviation of the data, and of TrigFlow's noise.
    """

    schedule: NoiseSchedule
    sigma_data: float = 1.0

    def angle(self, t: Tensor) -> Tensor:
        """TrigFlow's time at ``t``, from 0 for data to pi / 2 for noise; both (B,), float64."""
        alpha, sigma = self.schedule.coefficients(t)
        return torch.atan2(sigma, alpha * self.sigma_data)

    def time(self, angle: Tensor) -> Tensor:
        """The inverse of :meth:`angle`; both (B,). 0 and pi / 2 are beyond a family that reaches neither."""
        # An angle in float32 may lie beyond the right one.
        tan = angle.double().clamp(max=math.pi / 2).tan()
        return self.schedule.time_from_log_snr(-2 * (self.sigma_data * tan).log())

    def scale(self, t: Tensor) -> Tensor:
        """What y is multiplied with to be x_t: sqrt(alpha^2 + sigma^2 / sigma_data^2) at ``t``; both (B,)."""
        alpha, sigma = self.schedule.coefficients(t)
        return (alpha**2 + (sigma / self.sigma_data) ** 2).sqrt()

    def sample(self, x_t: Tensor, t: Tensor) -> Tensor:
        """y (B, ...) of ``x_t`` (B, ...) at ``t`` (B,)."""
        return x_t * expand(1 / self.scale(t), x_t)

    def moved(self, y: Tensor, t: Tensor) -> Tensor:
        """x_t (B, ...) of ``y`` (B, ...) at ``t`` (B,)."""
        return y * expand(self.scale(t), y)

    def output_map(self, kind: str, t: Tensor) -> tuple[Tensor, Tensor]:
        """(skip, out), each float64 (B,), of F = skip x_t + out raw at ``t`` (B,), which is above 0.

        ``kind``: of the raw output, see :data:`fewstep.diffusion.prediction.KINDS`; ``flow`` is noise - x0.
        """
        alpha, sigma = self.schedule.coefficients(t)
        angle = self.angle(t)
        cos, sin = angle.cos(), angle.sin() / self.sigma_data
        # F = cos noise - sin x0 / sigma_data, and both follow from x_t and noise - x0.
        skip, out = (cos - sin) / (alpha + sigma), (cos * alpha + sin * sigma) / (alpha + sigma)
        to_flow, of_raw = velocity_map(kind, self.schedule, t) if kind != "flow" else (0.0, 1.0)
        return skip + out * to_flow, out * of_raw

    def output(self, raw: Tensor, kind: str, x_t: Tensor, t: Tensor) -> Tensor:
        """F (B, ...) of the raw output (B, ...) at ``x_t`` (B, ...) and ``t`` (B,)."""
        return guided_x0(x_t, *self.output_map(kind, t), raw)
