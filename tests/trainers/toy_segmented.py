"""Segmented consistency over vectors of 6 with labels, for the tests of its class."""

from pathlib import Path

import torch
from torch import nn
from toys import TinyNetwork, role

from fewstep.critic.jumps import JumpDiscriminator
from fewstep.diffusion.discretization import SigmaRange
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule, NoiseSchedule
from fewstep.diffusion.timesteps import even_grid
from fewstep.networks.features import FeatureTap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.head_role import HeadRole
from fewstep.trainers.segmented_consistency import SegmentedConsistency, SegmentedConsistencyConfig


class Head(nn.Module):
    """Logits (B,) of features (B, C)."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.logit = nn.Linear(channels, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.logit(features.tanh()).squeeze(1)


def config(out: Path, variant: str = "tcd", **settings) -> SegmentedConsistencyConfig:
    defaults = {"max_steps": 8, "batch_size": 4, "log_steps": 1, "report_to": "none", "lr": 1e-3, "steps": 4}
    if variant == "tscd" and "segments" not in settings:
        defaults["segments"] = [4, 2, 1]
    return SegmentedConsistencyConfig(
        teacher="tiny", out=str(out), variant=variant, **{"data": "numbers", **defaults, **settings}
    )


def grids_of(settings: SegmentedConsistencyConfig) -> list[float]:
    """Every time at which the student is sampled."""
    counts = [n for n in range(1, settings.steps + 1) if n % settings.resolved().segments[-1] == 0]
    return sorted({t for count in counts for t in even_grid(count).tolist()})


def vector_method(
    settings: SegmentedConsistencyConfig,
    schedule: NoiseSchedule | None = None,
    kind: str = "flow",
    guidance_scale: float = 1.0,
) -> SegmentedConsistency:
    """The class over vectors of 6 with labels; the student starts as the teacher."""
    settings = settings.resolved()
    schedule = schedule or FlowSchedule()
    torch.manual_seed(0)
    first, roles = TinyNetwork(6), {}
    names = ["teacher", "student", *(["target"] if settings.target_decay != 0 else [])]
    for name in [*names, *(["ema"] if settings.ema_decay else [])]:
        network = TinyNetwork(6)
        network.load_state_dict(first.state_dict())
        roles[name] = role(name, network, schedule, kind, trainable=name == "student")
    judge = None
    if settings.judged:
        roles["discriminator"] = heads = HeadRole("discriminator", roles["teacher"])
        heads.add("head", Head())
        judge = JumpDiscriminator(heads, FeatureTap("inner"), schedule, settings.adversarial_loss)
    renoise = "ode" if settings.renoise == "auto" else settings.renoise
    grid = tuple(even_grid(settings.steps).tolist())
    return SegmentedConsistency(
        settings,
        roles,
        GuidedDenoiser(roles["teacher"], guidance_scale),
        Sampler(schedule, grid, renoise, schedule.initial_scale(), settings.gamma),
        settings.make_stages(SigmaRange(schedule), 1.0, grids_of(settings)),
        judge,
    )
