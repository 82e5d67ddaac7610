"""Hyper-SD over vectors of 6 with labels, or of 2 without, for the tests of its class."""

from pathlib import Path

import torch
from torch import Tensor, nn
from toys import TinyNetwork, role

from fewstep.data.batch import Asked
from fewstep.diffusion.discretization import SigmaRange
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule, NoiseSchedule
from fewstep.diffusion.timesteps import even_grid
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.hyper_sd import HyperSd, HyperSdConfig
from fewstep.trainers.segmented_consistency import SegmentedConsistency
from fewstep.training.rewards import Rewards

STAGES = "tscd:2,feedback:2,score"


def first_entry(pictures: Tensor, asked: Asked) -> Tensor:
    return pictures.flatten(1)[:, 0]


def config(out: Path, **settings) -> HyperSdConfig:
    defaults = {"max_steps": 8, "batch_size": 4, "log_steps": 1, "report_to": "none", "lr": 1e-3, "steps": 4}
    defaults |= {"segments": [2, 1], "intervals": [8], "adversarial_weight": [0.0], "data": "numbers"}
    defaults |= {"stages": STAGES, "reward": "my.Reward", "critic_updates": 2}
    defaults |= {"reward_look_steps": 1000} if settings.get("reward", "my.Reward") is not None else {}
    return HyperSdConfig(teacher="tiny", out=str(out), **{**defaults, **settings})


def toy_method(
    settings: HyperSdConfig,
    schedule: NoiseSchedule | None = None,
    kind: str = "flow",
    make: type[nn.Module] | None = None,
    reward=first_entry,
) -> HyperSd:
    """The class; every role starts as the teacher."""
    settings = settings.resolved()
    schedule = schedule or FlowSchedule()
    torch.manual_seed(0)
    first, roles = (TinyNetwork(6) if make is None else make()), {}
    for name in ("teacher", "student", *(["target"] if settings.target_decay else []), "critic"):
        network = TinyNetwork(6) if make is None else make()
        network.load_state_dict(first.state_dict())
        roles[name] = role(name, network, schedule, kind, trainable=name in ("student", "critic"))
    renoise = "ode" if settings.renoise == "auto" else settings.renoise
    grid = tuple(even_grid(settings.steps).tolist())
    visited = sorted({t for count in range(1, settings.steps + 1) for t in even_grid(count).tolist()})
    trajectories = SegmentedConsistency(
        settings,
        roles,
        GuidedDenoiser(roles["teacher"], 1.0, further=0 if make is not None else 1),
        Sampler(schedule, grid, renoise, schedule.initial_scale(), settings.gamma),
        settings.make_stages(SigmaRange(schedule), 1.0, visited),
    )
    rewards = None
    if settings.reward is not None:
        looks = settings.reward_look_steps
        rewards = Rewards(settings, {"first": reward}, None, "teacher", lambda x0: x0, roles["teacher"], looks)
    return HyperSd(settings, trajectories, rewards=rewards)
