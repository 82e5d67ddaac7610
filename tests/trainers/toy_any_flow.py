"""AnyFlow over vectors of 6 with labels: real roles around tiny networks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from toys import TABLE, TinyNetwork, labels, role

from fewstep.data.batch import Batch, Pairs, Real
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule
from fewstep.networks.flow_map import SECOND_TIME, FlowMapDenoiser
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.any_flow import AnyFlow, AnyFlowConfig

SCHEDULES = {"flow": FlowSchedule(), "epsilon": TABLE, "v_prediction": TABLE, "sample": TABLE, "edm": EDMSchedule()}
#: A run of stage 2 alone.
POLICY = {"stage": "on_policy", "init": "map"}


class Telling(nn.Module):
    """A second time that is trained: the gap, times a number, is added to what the network sees of the label."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def end(self, _time: object, following: object) -> object:
        return following

    @contextmanager
    def on(self, network: nn.Module, gap: Callable[[], Tensor]) -> Iterator[None]:
        def told(_module: nn.Module, arguments: tuple, named: dict) -> tuple:
            return arguments, {**named, "label": named["label"] + self.factor * gap().float()}

        handle = network.register_forward_pre_hook(told, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def config(out: Path | str = "out", **settings) -> AnyFlowConfig:
    return AnyFlowConfig(teacher="tiny", out=str(out), **{"report_to": "none", "sample_steps": 0, **settings})


def method(
    settings: AnyFlowConfig | None = None, kind: str = "flow", guidance_scale: float = 1.0, shift: float = 1.0
) -> AnyFlow:
    schedule, settings = SCHEDULES[kind], settings or config()
    torch.manual_seed(0)
    names = ["teacher", "student", *(["critic"] if settings.stage != "map" else [])]
    names += ["ema"] if settings.ema_decay else []
    roles = {name: role(name, TinyNetwork(6), schedule, kind, name in ("student", "critic")) for name in names}
    for name in {"student", "ema"} & roles.keys():
        roles[name].add(SECOND_TIME, Telling().requires_grad_(name == "student"))
        roles[name].denoiser = FlowMapDenoiser(roles[name].denoiser, roles[name].added[SECOND_TIME])
    if "ema" in roles:
        roles["ema"].copy_weights(roles["student"])
    guided = GuidedDenoiser(roles["teacher"], guidance_scale)
    sampler = Sampler(schedule, (1.0, 0.5), "ode", schedule.initial_scale())
    return AnyFlow(settings, roles, guided, sampler, shift=shift)


def batch(count: int = 8, step: int = 0, logging: bool = False) -> Batch:
    draws, x0 = Draws(0, step, range(count)), torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    told = labels([1.0] * count, 0.0)
    return Batch(count, (6,), told, draws, Real(x0, told), logging, Pairs(x0, x0, told), per_step=count)


class Samples:
    """Real samples or pairs of a run, the same at every place of its stream."""

    def __init__(self, kind: type) -> None:
        self.kind, self.x0 = kind, torch.randn(64, 6, generator=torch.Generator().manual_seed(1))

    def batch(self, seed: int, positions: list[int]) -> Real | Pairs:
        x0 = self.x0[[position % 64 for position in positions]]
        told = labels([1.0] * len(x0), 0.0)
        return Real(x0, told) if self.kind is Real else Pairs(x0, x0, told)
