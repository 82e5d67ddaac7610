"""Continuous-time consistency over vectors of 6 with labels, for the tests of its class."""

from collections.abc import Sequence

import torch
from toys import TinyNetwork, labels, role

from fewstep.data.batch import Batch, Pairs, Real
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule, NoiseSchedule
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.log_variance import LOG_VARIANCE, LogVariance
from fewstep.trainers.continuous_consistency import ContinuousConsistency, ContinuousConsistencyConfig

GRID = (1.0, 0.75)


def config(variant: str = "scm", **settings) -> ContinuousConsistencyConfig:
    defaults = {"max_steps": 4, "batch_size": 4, "log_steps": 1, "report_to": "none", "lr": 1e-3, "out": "out"}
    if variant == "tcm":
        defaults |= {"data": "numbers", "init": "first"}
    return ContinuousConsistencyConfig(teacher="tiny", variant=variant, **{**defaults, **settings})


def vector_method(
    settings: ContinuousConsistencyConfig,
    schedule: NoiseSchedule | None = None,
    kind: str = "flow",
    guidance_scale: float = 1.0,
    double: bool = False,
) -> ContinuousConsistency:
    """Over vectors of 6 with labels; the student starts as the teacher."""
    settings = settings.resolved()
    schedule = schedule or FlowSchedule()
    torch.manual_seed(0)
    first, roles = TinyNetwork(6), {}
    names = ["teacher", "student", *["critic"] * settings.matching, *["target"] * (settings.variant == "tcm")]
    for name in [*names, *["ema"] * (settings.ema_decay > 0)]:
        network = TinyNetwork(6)
        network.load_state_dict(first.state_dict())
        network = network.double() if double else network
        roles[name] = role(name, network, schedule, kind, trainable=name in ("student", "critic"))
    if settings.log_variance:
        roles["student"].add(LOG_VARIANCE, LogVariance())
    guided = GuidedDenoiser(roles["teacher"], guidance_scale)
    sampler = Sampler(schedule, GRID[: settings.steps], "fresh", schedule.initial_scale())
    return ContinuousConsistency(settings, roles, guided, sampler)


class Numbers:
    """Samples of 6 numbers, real or a teacher's."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def batch(self, seed: int, positions: Sequence[int]) -> Real | Pairs:
        x0 = torch.stack([torch.linspace(-1, 1, 6) * (position % 3) for position in positions])
        told = labels([float(position % 3 - 1) for position in positions])
        return Real(x0, told) if self.kind is Real else Pairs(x0, x0, told)


def batch(step: int, rows: Sequence[int] = range(8), double: bool = False) -> Batch:
    rows = list(rows)
    real, pairs = (Numbers(kind).batch(0, rows) for kind in (Real, Pairs))
    if double:
        real.x0, pairs.x0 = real.x0.double(), pairs.x0.double()
    told = labels([float(row % 3 - 1) for row in rows])
    return Batch(len(rows), (6,), told, Draws(0, step, rows), real, False, pairs)
