"""Phased DMD over vectors, for the tests of its class."""

from pathlib import Path

import torch
from toys import TinyNetwork, role

from fewstep.diffusion.phases import make_phases
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule
from fewstep.networks.experts import ExpertsRole
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import Role
from fewstep.trainers.phased_dmd import PhasedDmd, PhasedDmdConfig, critic_names
from tests.trainers.test_dmd2 import TABLE

GRID = (1.0, 0.75, 0.5, 0.25)
KINDS = {
    "epsilon": (TABLE, "epsilon"),
    "v": (TABLE, "v_prediction"),
    "sample": (TABLE, "sample"),
    "flow": (FlowSchedule(), "flow"),
    "edm": (EDMSchedule(), "edm"),
}


def config(out: Path, **settings) -> PhasedDmdConfig:
    defaults = {"max_steps": 8, "batch_size": 4, "log_steps": 1, "report_to": "none", "lr": 1e-2, "sample_steps": 0}
    return PhasedDmdConfig(teacher="tiny", out=str(out), **{**defaults, **settings})


def method(settings: PhasedDmdConfig, kind: str = "flow", network=lambda: TinyNetwork(6), grid=GRID) -> PhasedDmd:
    """Phased DMD over vectors; all roles start as the teacher."""
    schedule, prediction = KINDS[kind]
    torch.manual_seed(0)
    settings, weights = settings.resolved(), network().state_dict()

    def make(name: str, trainable: bool) -> Role:
        one = network()
        one.load_state_dict(weights)
        return role(name, one, schedule, prediction, trainable)

    phases = make_phases(grid, settings.phases)

    def experts(name: str, trainable: bool) -> ExpertsRole:
        return ExpertsRole(name, {f"phase_{k}": (p.lowest, make(name, trainable)) for k, p in enumerate(phases, 1)})

    roles = {"teacher": make("teacher", False), "student": experts("student", True)}
    roles |= {name: make(name, True) for name in critic_names(settings, len(phases))}
    if settings.ema_decay:
        roles["ema"] = experts("ema", False)
    sampler = Sampler(schedule, grid, settings.renoise, schedule.initial_scale())
    return PhasedDmd(settings, roles, GuidedDenoiser(roles["teacher"], 1.0, further=0), sampler, phases)
