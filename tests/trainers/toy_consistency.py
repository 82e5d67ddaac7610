"""Consistency over vectors of 6 with labels, for the tests of its class."""

from pathlib import Path

import torch
from toys import TinyNetwork, role

from fewstep.diffusion.discretization import SigmaRange
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule, NoiseSchedule
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.consistency import Consistency, ConsistencyConfig

GRID = (1.0, 0.75, 0.5, 0.25)


def config(out: Path, variant: str = "lcm", **settings) -> ConsistencyConfig:
    defaults = {"max_steps": 4, "batch_size": 4, "log_steps": 1, "report_to": "none", "lr": 1e-3, "steps": 4}
    if variant in ("ct", "ict", "ect"):
        defaults["data"] = "numbers"
    return ConsistencyConfig(teacher="tiny", out=str(out), variant=variant, **{**defaults, **settings})


def vector_method(
    settings: ConsistencyConfig,
    schedule: NoiseSchedule | None = None,
    kind: str = "flow",
    guidance_scale: float = 1.0,
    timestep_scaling: float | None = None,
) -> Consistency:
    """Consistency over vectors of 6 with labels; the student starts as the teacher."""
    settings = settings.resolved()
    schedule = schedule or FlowSchedule()
    torch.manual_seed(0)
    first, roles = TinyNetwork(6), {}
    names = ["teacher", "student", *(["target"] if settings.target_decay != 0 else [])]
    for name in [*names, *(["ema"] if settings.ema_decay else [])]:
        network = TinyNetwork(6)
        network.load_state_dict(first.state_dict())
        roles[name] = role(name, network, schedule, kind, trainable=name == "student")
    levels = SigmaRange(schedule)
    return Consistency(
        settings,
        roles,
        GuidedDenoiser(roles["teacher"], guidance_scale),
        Sampler(schedule, GRID, "fresh", schedule.initial_scale()),
        settings.make_discretization(levels, 1.0, list(GRID)),
        settings.make_boundary(levels, timestep_scaling),
    )
