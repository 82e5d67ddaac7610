"""What the check of a walk asks of numbers: x_t in the schedule's sense, and how near is near enough."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.diffusion.prediction import expand
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.export.errors import SchedulerCheckError

#: Relative to values of size one; float32 leaves 1e-6 here, one table entry amiss about 1e-3.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def time_of(schedule: NoiseSchedule, timestep: float, like: Tensor) -> Tensor:
    """The t (B,) of a scheduler's timestep, on the CPU in float64."""
    return schedule.time(torch.full((like.shape[0],), timestep, dtype=torch.float64))


def x_t_of(schedule: NoiseSchedule, network_input: Tensor, t: Tensor) -> Tensor:
    """x_t in the schedule's sense, float64 on the CPU: the network's input without the scale of its time."""
    x = network_input.double().cpu()
    return x / expand(schedule.input_scale(t), x)


def demand(value: Tensor, expected: Tensor, tolerance: float, text: str, among: Tensor | None = None) -> float:
    """The deviation in units of the tolerance, of some entries or of all. A NaN fails."""
    away = (value - expected).abs()
    off = float((away if among is None else away.where(among, torch.zeros_like(away))).max())
    if not off <= tolerance:
        raise SchedulerCheckError(f"{text} (off by {off:.2g}, allowed {tolerance:.1g})")
    return off / tolerance
