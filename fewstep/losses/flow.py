"""Flow matching on pairs of noise and sample (Liu et al. 2022, rectified flow; Lee et al. 2024, 2-rectified flow++).

The line from a sample to its noise has the constant velocity noise - x0. At the point (1 - tau) x0 + tau noise of
it, which is x_t / (alpha + sigma), a student that speaks of x0 has the velocity (point - x0_student) / tau, so that
its error is one of x0. This holds in every family of schedules: see
:meth:`fewstep.diffusion.schedule.NoiseSchedule.flow_time`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.diffusion.prediction import expand
from fewstep.kernels.error_sums import error_sums


def velocity_error(x0: Tensor, x0_student: Tensor, flow_time: Tensor) -> Tensor:
    """The student's velocity minus noise - x0, which is (x0 - x0_student) / tau.

    Shapes: ``x0`` (no gradient flows to it), ``x0_student``: (B, ...); ``flow_time``: tau (B,) in (0, 1]. Returns
    (B, ...), float32 or wider.
    Source: Liu et al. 2022, Eq. 1, the integrand under the square.
    """
    x0_student = x0_student if x0_student.dtype in (torch.float32, torch.float64) else x0_student.float()
    return (x0.detach().to(x0_student.dtype) - x0_student) * expand(1 / flow_time, x0_student)


def squared(error: Tensor) -> Tensor:
    """The mean of the squares of each sample: (B, ...) -> (B,). Source: Liu et al. 2022, Eq. 1."""
    return error_sums(error) / error[0].numel()
