"""SiD over vectors of 6 with labels, for the tests of its class."""

from __future__ import annotations

from pathlib import Path

import torch
from toys import Labels, TinyNetwork, role

from fewstep.data.batch import Batch
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule, NoiseSchedule
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.sid import Sid, SidConfig

GRID = (1.0, 0.75, 0.5, 0.25)
ROLES = ("teacher", "student", "critic")
OFF = {"guidance_scale": 1.0}


def config(out: Path, **settings) -> SidConfig:
    defaults = {"max_steps": 4, "batch_size": 4, "log_steps": 1, "report_to": "none", "lr": 1e-3}
    return SidConfig(teacher="tiny", out=str(out), **{**defaults, **settings})


def method_of(settings: SidConfig, roles: dict, sampler: Sampler, discriminator=None, further: int = 0) -> Sid:
    kappas = settings.kappas(1.0 if settings.guidance_scale is None else settings.guidance_scale)
    scales = (("teacher", kappas.teacher), ("critic", kappas.critic), ("critic", kappas.critic_training))
    guided = [GuidedDenoiser(roles[name], scale, further) for name, scale in scales]
    return Sid(settings, roles, *guided, sampler, discriminator)


def vector_method(
    settings: SidConfig, schedule: NoiseSchedule | None = None, kind: str = "flow", renoise: str = "fresh"
) -> Sid:
    """SiD over vectors of 6 with labels, the negative being the label 5; three different networks."""
    schedule = schedule or FlowSchedule()
    torch.manual_seed(0)
    roles = {name: role(name, TinyNetwork(6), schedule, kind, trainable=name != "teacher") for name in ROLES}
    return method_of(settings, roles, Sampler(schedule, GRID, renoise, schedule.initial_scale()), further=1)


def batch(step: int, indices: range = range(4), logging: bool = False) -> Batch:
    conditions = Labels().batch(0, list(indices))
    return Batch(len(indices), (6,), conditions, Draws(0, step, indices), None, logging)


def step_with_last(last: int) -> int:
    """A step in which the student's step ``last`` of four is drawn."""
    return next(k for k in range(100) if Draws(0, k, range(1)).shared_integer("student_step", 0, 4) == last)
