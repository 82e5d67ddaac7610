"""TwinFlow over vectors of 6 with labels: real roles around tiny networks."""

from pathlib import Path

import torch
from toys import TinyNetwork, labels, role

from fewstep.data.batch import Batch, Pairs, Real
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import Sampler
from fewstep.networks.flow_map import SECOND_TIME, FlowMapDenoiser
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.twin_flow import TwinFlow, TwinFlowConfig
from tests.trainers.toy_any_flow import SCHEDULES, Telling


def config(out: Path | str = "out", **settings) -> TwinFlowConfig:
    return TwinFlowConfig(teacher="tiny", out=str(out), **{"report_to": "none", "sample_steps": 0, **settings})


def method(settings: TwinFlowConfig | None = None, kind: str = "flow", guidance_scale: float = 1.0) -> TwinFlow:
    schedule, settings = SCHEDULES[kind], settings or config()
    torch.manual_seed(0)
    names = ["teacher", "student", *(["target"] if settings.target_decay else [])]
    roles = {name: role(name, TinyNetwork(6), schedule, kind, name == "student") for name in names}
    for name in {"student", "target"} & roles.keys():
        roles[name].add(SECOND_TIME, Telling().requires_grad_(name == "student"))
        roles[name].denoiser = FlowMapDenoiser(roles[name].denoiser, roles[name].added[SECOND_TIME])
    guided = GuidedDenoiser(roles["teacher"], guidance_scale)
    return TwinFlow(settings, roles, guided, Sampler(schedule, (1.0, 0.5), "ode", schedule.initial_scale()))


def batch(count: int = 8, step: int = 0) -> Batch:
    draws, x0 = Draws(0, step, range(count)), torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    told = labels([1.0] * count, 0.0)
    return Batch(count, (6,), told, draws, Real(x0, told), False, Pairs(x0, x0, told), per_step=count)
