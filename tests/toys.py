"""Small stand-ins for stock networks, so that methods and the loop run in milliseconds; nothing here is a mock.

Every role is a real Role around a real NetworkDenoiser; only the network and the recipe are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning, Leaf
from fewstep.conditioning.outside import OUTSIDE
from fewstep.config.run import RunConfig
from fewstep.data.batch import Batch, Batches
from fewstep.diffusion.draws import keyed_order
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, TableSchedule
from fewstep.diffusion.timesteps import uniform_times
from fewstep.losses.score import denoising_loss, distribution_matching, native_weight
from fewstep.networks.adapters import AdapterRole, Backbone
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.roles import NetworkRole
from fewstep.recording import Recording
from fewstep.training.best import Best, Measure
from fewstep.training.distributed import Processes
from fewstep.training.loop import Loop
from fewstep.training.method import Method, Renew, Turn
from fewstep.training.monitor import Monitor


class PlainRecipe:
    """Calls a network with the sample, the schedule's timestep and the conditioning's arguments."""

    component = "network"
    unread: Tensor | None = None

    def call(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning, *, continuous: bool = False
    ) -> Tensor:
        told = conditioning.arguments()
        told.pop(OUTSIDE, None)
        return network(x, timestep, **told)


class Brightness:
    """A reward of pictures, made as a dotted class of ``--reward`` is; darker where more was asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, pictures: Tensor, asked: Sequence[str] | Sequence[int] | None) -> Tensor:
        """(B, C, H, W) -> (B,)."""
        assert asked is not None and len(asked) == len(pictures)
        wanted = torch.tensor([len(str(one)) for one in asked], dtype=pictures.dtype, device=self.device)
        return pictures.flatten(1).mean(1) / wanted


class TinyNetwork(nn.Module):
    """A network with two layers over the flattened sample, the time and the label."""

    def __init__(self, size: int, width: int = 16, time_scale: float = 1e-3) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.inner = nn.Linear(size + 2, width)
        self.outer = nn.Linear(width, size)

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        extra = torch.stack([self.time_scale * timestep, label], 1).to(x.dtype)
        return self.outer(torch.tanh(self.inner(torch.cat([x.flatten(1), extra], 1)))).view_as(x)


def role(
    name: str, network: nn.Module, schedule: NoiseSchedule, kind: str, trainable: bool = True, **added
) -> NetworkRole:
    network = network.eval().requires_grad_(trainable)
    return NetworkRole(name, NetworkDenoiser(network, PlainRecipe(), schedule, kind), added)


def adapter_role(name: str, backbone: Backbone, recording: Recording, *, trainable: bool = True) -> AdapterRole:
    """A role whose adapter does something: its second factor is not zero."""
    adapter = None
    if name != "teacher":
        adapter = backbone.add(name, trainable=trainable, seed=0)
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        for parameter in adapter.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    denoiser = NetworkDenoiser(
        backbone.network,
        recording.recipe,
        recording.schedule,
        recording.prediction_type,
        active=partial(backbone.active, None if name == "teacher" else name),
    )
    return AdapterRole(name, backbone, denoiser, adapter)


#: The label that guidance leads away from, unless a test names another.
NULL = 5.0


def labels(values: Sequence[float] | Tensor, null: float | None = NULL) -> Conditioning:
    others = [] if null is None else [labels([null] * len(values), None)]
    return Conditioning({"label": Leaf(torch.as_tensor(values, dtype=torch.float32), rows=1)}, len(values), others)


def unconditional(batch: int) -> Conditioning:
    return Conditioning({}, batch)


class Labels:
    """Conditions of a run: one label per sample, or none, in the run's keyed order."""

    def __init__(self, values: Sequence[float] | None = (-1.0, 0.0, 1.0), null: float = NULL) -> None:
        self.values, self.null = values, null

    def batch(self, seed: int, positions: Sequence[int]) -> Conditioning:
        if self.values is None:
            return unconditional(len(positions))
        told = [self.values[keyed_order(seed, "labels", len(self.values), place)] for place in positions]
        return labels(told, self.null)


def make_loop(
    method: Method,
    config: RunConfig,
    shape: tuple[int, ...] = (6,),
    *,
    conditions: Labels | None = None,
    real=None,
    pairs=None,
    on_samples: Callable[[int, Callable[[], None]], dict[str, float]] = lambda step, pause: {},
    on_evaluation: Callable[[int, Callable[[], None]], dict[str, float]] = lambda step, pause: {},
    measure: Measure | None = None,
    name: str = "tiny",
) -> Loop:
    """The real loop with a real monitor, on the CPU, for this process of however many there are."""
    accelerator = Accelerator(cpu=True)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    loop = Loop(
        method,
        name,
        config,
        batches=Batches(conditions or Labels(), shape, accelerator.device, real, pairs),
        processes=processes,
        monitor=Monitor(Path(config.out), config.max_steps, accelerator),
        on_samples=on_samples,
        on_evaluation=lambda pause: on_evaluation(loop.step, pause),
        best=Best(Path(config.out), measure, config.eval_patience, processes),
    )
    return loop


class TinyMethod:
    """A distribution-matching method over vectors: student every second step, critic in every step.

    Args:
        ema: whether there is an average of the student.
        seed: of the initial weights.
        renew: the step before whose turns the critic starts over like the student.
        poison: (role, step) from which on the role's gradients are not numbers.
        lr: of both roles.
    """

    SHAPE = (6,)
    CRITIC_UPDATES = 2

    def __init__(
        self,
        *,
        ema: bool = False,
        seed: int = 0,
        renew: int | None = None,
        poison: tuple[str, int] | None = None,
        lr: float = 1e-3,
    ) -> None:
        self.schedule = FlowSchedule()
        self.renew, self.poison, self.lr = renew, poison, lr
        torch.manual_seed(seed)
        names = {"teacher": False, "student": True, "critic": True} | ({"ema": False} if ema else {})
        networks = {name: TinyNetwork(6) for name in names}
        if ema:
            networks["ema"].load_state_dict(networks["student"].state_dict())
        self.roles = {name: role(name, networks[name], self.schedule, "flow", on) for name, on in names.items()}

    def learning_rate(self, role: str) -> float:
        return self.lr

    def turns(self, step: int, batch: Batch) -> Iterator[Turn | Renew]:
        if step == self.renew:
            yield Renew("critic", like="student")
        student_turn = step % self.CRITIC_UPDATES == 0
        start = torch.ones(batch.size, dtype=torch.float64)
        with torch.set_grad_enabled(student_turn):
            x0 = self.roles["student"](batch.draws.normal("noise", batch.shape), start, batch.conditioning)
        if student_turn:
            x_t, t = self.noised(x0.detach(), batch, "matching")
            with torch.no_grad():
                verdicts = [self.roles[name](x_t, t, batch.conditioning) for name in ("teacher", "critic")]
            loss, gradient = distribution_matching(x0, *verdicts)
            log = {"student/matching": loss, "student/teacher_mean": verdicts[0].mean()}
            yield Turn("student", [(x0, gradient * self.spoiler("student", step))], log)
        x0 = x0.detach()
        x_t, t = self.noised(x0, batch, "critic")
        weight = native_weight("flow", self.schedule, t)
        loss = denoising_loss(x0, self.roles["critic"](x_t, t, batch.conditioning), weight)
        yield Turn("critic", [(loss * self.spoiler("critic", step), None)], {"critic/denoising": loss})

    def noised(self, x0: Tensor, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
        t = uniform_times(batch.draws.uniform(f"{name}_time"), 0.02, 0.98)
        noise = batch.draws.normal(f"{name}_noise", batch.shape)
        return add_noise(x0, noise, self.schedule.coefficients(t)), t

    def spoiler(self, role: str, step: int) -> float:
        poisoned = self.poison is not None and role == self.poison[0] and step >= self.poison[1]
        return float("nan") if poisoned else 1.0


TABLE = TableSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0))

#: A test that is asked for ``schedule`` and ``kind`` of every family.
every_kind_of_teacher = pytest.mark.parametrize(
    ("schedule", "kind"),
    [(TABLE, "epsilon"), (TABLE, "v_prediction"), (TABLE, "sample"), (FlowSchedule(), "flow"), (EDMSchedule(), "edm")],
    ids=["epsilon", "v", "sample", "flow", "edm"],
)


def roles_that_move(method: Method) -> set[str]:
    """Run a method of toy networks, and name the roles whose weights it changed, to finite ones."""
    before = {name: one.state_dict()["network.outer.weight"].clone() for name, one in method.roles.items()}
    make_loop(method, method.config).run()
    after = {name: one.state_dict()["network.outer.weight"] for name, one in method.roles.items()}
    assert all(torch.isfinite(value).all() for value in after.values())
    return {name for name in before if not torch.equal(before[name], after[name])}


class Asked:
    """The times (N,) at which roles are asked, by role, apart for passes with and without a gradient."""

    def __init__(self, *roles: NetworkRole) -> None:
        self.times: dict[tuple[str, bool], list[Tensor]] = {}
        for one in roles:
            one.denoiser.on_call = partial(self._note, one.name)

    def _note(self, name: str, _x_t: Tensor, t: Tensor, _early: bool) -> Callable[[Tensor], None]:
        self.times.setdefault((name, torch.is_grad_enabled()), []).append(t)
        return lambda _answer: None

    def span(self, name: str, *, trained: bool) -> tuple[float, float]:
        """The lowest and the highest time."""
        times = torch.cat(self.times[name, trained])
        return times.min().item(), times.max().item()
