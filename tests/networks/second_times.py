"""A student of two times beside its teacher, a second time that does something, and the places where one enters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.conditioning.conditioning import Conditioning
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, TableSchedule
from fewstep.networks.roles import Role, make_role
from fewstep.networks.second_time import add_second_time
from fewstep.networks.time_embedders import find_time_embedders
from fewstep.recording import Recording, record

TABLE = TableSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0))
SCHEDULES: dict[str, NoiseSchedule] = {"flow": FlowSchedule(), "table": TABLE, "edm": EDMSchedule()}


@dataclass
class Told:
    """A student of two times beside its teacher, in float64, and a point to ask them at."""

    teacher: Role
    student: Role
    x_t: Tensor
    t: Tensor
    r: Tensor
    conditioning: Conditioning


def told(recording: Recording, dtype: torch.dtype = torch.float64, **settings: Any) -> Told:
    """Roles as a run makes them; a time between two entries of a table, and one that float32 timesteps hold exactly."""
    roles = {
        name: make_role(name, recording, trainable=name == "student", dtype=dtype, **settings)
        for name in ("teacher", "student")
    }
    conditioning = Conditioning(recording.marked, 1).select([0, 0])
    x = torch.randn(2, *recording.sample_shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    how = {"gradient_checkpointing": False, "seed": 0, **settings}
    add_second_time(roles, recording.component, x, conditioning, differentiated=True, **how)
    roles["student"].added["second_time"].to(dtype)
    schedule = recording.schedule
    if isinstance(schedule, EDMSchedule):
        t = schedule.time_from_sigma(torch.tensor([0.9, 2.0], dtype=torch.float64))
    else:
        t = schedule.time(torch.tensor([512.5, 300.5], dtype=torch.float64))
    return Told(roles["teacher"], roles["student"], x, t, 0.4 * t, conditioning)


def stir(role: Role) -> None:
    """A second time that does something."""
    generator = torch.Generator().manual_seed(3)
    for head in role.added["second_time"].heads:
        head.weight.data += 0.3 * torch.randn(head.weight.shape, generator=generator)


def sites_of(pipeline: Any, **call: Any) -> dict[str, int]:
    recording = record(pipeline, **call)
    role = make_role("teacher", recording, trainable=False)
    conditioning = Conditioning(recording.marked, 1).select([0, 0])

    def ask(x: Tensor, t: Tensor) -> Tensor:
        return role.denoiser.raw(x, t, conditioning)

    t = torch.full((2,), 0.5, dtype=torch.float64)
    return find_time_embedders(role.denoiser.network, ask, torch.randn(2, *recording.sample_shape), t)
