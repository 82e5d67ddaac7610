"""The update of a role in the loop: what it counts, what follows it, and optimizers of older checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import TinyMethod, make_loop, role

from fewstep.config.run import RunConfig
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.kernels import dispatch
from fewstep.networks.roles import update_average
from fewstep.training.averages import Average
from fewstep.training.held import Held
from fewstep.training.loop import Loop
from fewstep.training.optimization import RoleOptimizer
from tests.training.loop_runs import config, weights


def test_every_update_of_a_run_is_counted_once(tmp_path: Path) -> None:
    with dispatch.counted() as counted:
        make_loop(TinyMethod(ema=True), config(tmp_path, max_steps=4, ema_decay=0.5)).run()
    assert counted["adamw", "closed"] == 4 + 2  # the critic in every step, the student in every second


class Reads(TorchDispatchMode):
    """Counts numbers that the host reads."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        self.count += function in (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default)
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_unless_it_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward passes, updates and averages; the batches, which the host makes, are there before."""
    loop = make_loop(TinyMethod(ema=True), config(tmp_path, max_steps=9, log_steps=4, ema_decay=0.5))
    batches = [list(loop._batches(step)) for step in range(4)]
    monkeypatch.setattr(loop, "_batches", lambda step, logging: batches[step])
    loop.one_step()
    tolist = Tensor.tolist  # on a CPU no operation that a mode sees

    def read(tensor: Tensor) -> list:
        reads.count += 1
        return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", read)
    with Reads() as reads:
        assert loop.one_step() == {} and loop.one_step() == {}
        assert reads.count == 0
        assert loop.one_step() and reads.count > 0


@pytest.mark.parametrize("form", ["reference", "triton"])
def test_a_run_in_another_form_ends_where_it_would(tmp_path: Path, form: str) -> None:
    if form == "triton" and not dispatch.triton_runs_on("cpu"):
        pytest.skip("Triton is not installed")
    found: dict[str, TinyMethod] = {}
    for one in ("closed", form):
        found[one] = TinyMethod(ema=True)
        with dispatch.forced({"adamw": one}), dispatch.counted() as counted:
            make_loop(found[one], config(tmp_path / one, max_steps=4, ema_decay=0.5, max_grad_norm=0.1)).run()
        assert counted["adamw", one] == 6
    for name in ("student", "critic", "ema"):
        ours, others = (weights(method.roles[name]) for method in found.values())
        torch.testing.assert_close(ours, others, rtol=1e-4, atol=1e-6)


class Mixed(nn.Module):
    """Trained and frozen weights, a tensor of two names, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen = nn.Linear(3, 4), nn.Linear(4, 2)
        self.again, self.idle = self.trained, nn.Linear(2, 2)
        self.register_buffer("scale", torch.rand(3))
        self.register_buffer("count", torch.tensor(0))


def test_an_average_moves_with_the_update_as_it_does_alone() -> None:
    roles = {}
    for name in ("student", "in one pass", "alone"):
        roles[name] = role(name, Mixed(), FlowSchedule(), "flow", trainable=name == "student")
        roles[name].denoiser.network.frozen.requires_grad_(False)
    network = roles["student"].denoiser.network
    roles["alone"].copy_weights(roles["in one pass"])
    optimizer = RoleOptimizer(roles["student"], RunConfig(teacher="t", out=""), 0.1)
    average = Average(roles["in one pass"], roles["student"], Held(roles["student"]), lambda tensor: tensor)
    before = network.trained.weight.clone()
    for step in range(3):
        network.count += 1
        network.scale += 1.0
        for parameter in (network.trained.weight, network.trained.bias):  # and none for the idle layer
            parameter.grad = torch.randn_like(parameter)
        optimizer.update(step, [(average, 0.5 + 0.1 * step)])
        update_average(roles["alone"], roles["student"], 0.5 + 0.1 * step)
    assert not torch.equal(network.trained.weight, before)
    ours, others = (roles[name].state_dict() for name in ("in one pass", "alone"))
    assert all(torch.equal(ours[name], others[name]) for name in others)
    assert others["network.count"] == 3


class _Before:
    """What a run's optimizer did: foreach product, torch's fused AdamW, foreach averages after it."""

    def __init__(self, loop: Loop, name: str) -> None:
        self.parameters = loop.optimizers[name].held.own
        config = loop.config
        betas = config.adam_beta1, config.adam_beta2
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=1e-3, betas=betas, weight_decay=config.adam_weight_decay, fused=True
        )

    def state(self, names: list[str]) -> dict[str, Tensor]:
        kept = self.adamw.state_dict()["state"]
        return {f"{names[k]}/{key}": value for k, entry in kept.items() for key, value in entry.items()}


def test_an_older_checkpoints_optimizer_goes_on(tmp_path: Path) -> None:
    """torch's AdamW for three steps, then ours from its state: the weights of six steps of torch's."""
    loops = [make_loop(TinyMethod(), config(tmp_path / str(k))) for k in range(2)]
    before = [_Before(loop, "critic") for loop in loops]
    generator = torch.Generator().manual_seed(0)
    ours = loops[1].optimizers["critic"]
    ours.max_grad_norm = 0.0
    for step in range(6):
        gradients = [torch.randn(p.shape, generator=generator) for p in before[0].parameters]
        for k, one in enumerate(before):
            for parameter, gradient in zip(one.parameters, gradients):
                parameter.grad = gradient.clone()
            if k == 1 and step >= 3:
                ours.update(step)
            else:
                one.adamw.step()
        if step == 2:
            ours.load_state(before[1].state(ours.held.names))
    assert all(torch.equal(*pair) for pair in zip(before[0].parameters, before[1].parameters))
    left, right = before[0].state(ours.held.names), ours.state()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left)
