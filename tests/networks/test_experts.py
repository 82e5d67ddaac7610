"""Experts that share the time: each sample goes to its own, gradients come back, and a role of several is one role."""

from __future__ import annotations

import copy
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_flow
from torch import Tensor
from toys import TinyNetwork, adapter_role, labels, role

from fewstep.config.run import RunConfig
from fewstep.diffusion.intervals import TimedScale, TimeIntervals
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule
from fewstep.networks.adapters import Backbone
from fewstep.networks.experts import ExpertsRole
from fewstep.networks.features import find_tap
from fewstep.networks.guidance import GuidedDenoiser, guide
from fewstep.networks.heads import make_head
from fewstep.networks.roles import Role, make_role, update_average
from fewstep.recording import Recording, record
from fewstep.recording.watch.shake import shaken
from fewstep.training.optimization import RoleOptimizer

BOUND = 0.6
TIMES = torch.tensor([0.9, 0.1, 0.6, 0.59, 1.0], dtype=torch.float64)
HIGH = [0, 2, 4]  # which of them lie at or above the bound


def expert(seed: int) -> Role:
    torch.manual_seed(seed)
    return role("student", TinyNetwork(6).double(), FlowSchedule(), "flow")


def student(first: int = 1) -> ExpertsRole:
    return ExpertsRole("student", {"high": (BOUND, expert(first)), "low": (0.0, expert(first + 1))})


def sample() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def told() -> object:
    return labels([-1.0, 0.0, 1.0, 2.0, 3.0], null=7.0)


# --- times ------------------------------------------------------------------------------------------------------------


def test_a_time_read_off_a_timestep_lies_where_the_pipeline_puts_it() -> None:
    """Pipelines compare float32 timesteps; through t in float64 and back not one of them may change sides."""
    table = TableSchedule(torch.linspace(0.999, 0.001, 1000).cumprod(0).clamp(min=1e-8))
    for schedule, numbers in (
        (FlowSchedule(), torch.linspace(1, 1000, 997)),
        (table, torch.arange(1000.0)),
        (EDMSchedule(), torch.linspace(-1.5, 1.0, 997)),
    ):
        for bound in numbers[100:900:200]:
            lowest = float(schedule.time(bound.double()))
            intervals = TimeIntervals(schedule, (lowest, 0.0))
            around = torch.stack(
                [torch.nextafter(bound, bound - 1), bound, torch.nextafter(bound, bound + 1), *numbers]
            )
            if schedule is table:
                around = around.round()
            expected = (around < bound).long()
            assert torch.equal(intervals.index(schedule.time(around.double())), expected)


@pytest.mark.parametrize("lowest", [(), (0.5,), (0.2, 0.5, 0.0), (0.5, 0.5, 0.0)])
def test_intervals_descend_to_zero(lowest: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="descend to 0"):
        TimeIntervals(FlowSchedule(), lowest)


def test_each_interval_has_its_own_guidance() -> None:
    intervals = TimeIntervals(FlowSchedule(), (BOUND, 0.0))
    x, model = sample(), expert(1)
    guided = GuidedDenoiser(model, TimedScale(intervals, (4.0, 2.0)))
    assert guided.calls == 2
    found = guided(x, TIMES, told())
    pair = model(x, TIMES, told()), model(x, TIMES, labels([7.0] * 5))
    for k in range(5):
        wanted = guide(pair[0][k], pair[1][k], 4.0 if k in HIGH else 2.0)
        torch.testing.assert_close(found[k], wanted, rtol=1e-12, atol=1e-12)


# --- the denoiser -----------------------------------------------------------------------------------------------------


def test_each_sample_goes_to_the_expert_of_its_time_and_comes_back_in_its_place() -> None:
    both, x, conditioning = student(), sample(), told()
    calls = []
    for key, one in both.experts.items():
        one.denoiser.network.register_forward_hook(lambda *seen, key=key: calls.append((key, len(seen[2]))))
    for name in ("__call__", "raw"):
        calls.clear()
        found = getattr(both.denoiser, name)(x, TIMES, conditioning)
        assert calls == [("high", 3), ("low", 2)]
        for k in range(5):
            own = both.experts["high" if k in HIGH else "low"].denoiser
            alone = getattr(own, name)(x[k : k + 1], TIMES[k : k + 1], conditioning.select([k]))
            torch.testing.assert_close(found[k : k + 1], alone, rtol=1e-12, atol=1e-12)
    calls.clear()
    both(x, torch.full((5,), 0.3, dtype=torch.float64), conditioning)
    assert calls == [("low", 5)]


def test_who_is_told_which_expert_an_answer_is_of_looks_at_no_time() -> None:
    """As on fake tensors, whose values nobody can read."""
    experts = {"high": (BOUND, expert(1)), "low": (0.0, expert(2))}
    for number, key in enumerate(experts):
        told_apart = ExpertsRole("student", experts, lambda t, number=number: [number] * len(t))
        wanted = experts[key][1](sample(), TIMES, told())
        assert torch.equal(told_apart(sample(), TIMES, told()), wanted)


def test_gradients_are_those_of_separate_calls() -> None:
    both, conditioning = student(), told()
    x, gradient = sample().requires_grad_(), torch.randn(5, 6, dtype=torch.float64)
    found = torch.autograd.grad(both(x, TIMES, conditioning), [x, *both.parameters()], gradient)
    pieces = [
        both.experts["high" if k in HIGH else "low"](x[k : k + 1], TIMES[k : k + 1], conditioning.select([k]))
        for k in range(5)
    ]
    wanted = torch.autograd.grad(torch.cat(pieces), [x, *both.parameters()], gradient)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert all(bool(g.any()) for g in found)


# --- the role ---------------------------------------------------------------------------------------------------------


def test_a_role_of_several_saves_loads_copies_and_averages_each() -> None:
    one, other = student(1), student(3)
    names = [name for name, _ in one.named_parameters()]
    assert names[0] == "network.high.inner.weight" and "network.low.outer.bias" in names and len(names) == 8
    assert list(one.state_dict()) == names
    saved = {name: value.clone() for name, value in one.state_dict().items()}
    update_average(other, one, 0.25)
    theirs = student(3).state_dict()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, 0.25 * theirs[name] + 0.75 * saved[name])
    other.copy_weights(one)
    assert all(torch.equal(value, saved[name]) for name, value in other.state_dict().items())
    other = student(5)
    other.load_state_dict(saved)
    assert torch.equal(other(sample(), TIMES, told()), one(sample(), TIMES, told()))
    single = expert(9)
    one.copy_weights(single)  # a role of one network gives it to every expert
    torch.testing.assert_close(one(sample(), TIMES, told()), single(sample(), TIMES, told()), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="has the experts high, low, critic first, second"):
        one.copy_weights(ExpertsRole("critic", {"first": (0.5, expert(1)), "second": (0.0, expert(2))}))


def test_an_expert_without_a_gradient_stays_as_it_is(tmp_path: Path) -> None:
    """Neither weight decay nor old momenta may move it."""
    both = student()
    config = RunConfig(teacher="t", out=str(tmp_path), adam_weight_decay=0.1)
    optimizer = RoleOptimizer(both, config, 1e-2)

    def update(step: int, t: float) -> set[str]:
        both(sample(), torch.full((5,), t, dtype=torch.float64), told()).square().mean().backward()
        before = {name: value.clone() for name, value in both.state_dict().items()}
        momenta = {name: value.clone() for name, value in optimizer.state().items()}
        optimizer.update(step)
        after = optimizer.state()
        assert all(torch.equal(v, after[n]) for n, v in momenta.items() if n.startswith(f"network.{still(t)}"))
        return {name for name, value in both.state_dict().items() if not torch.equal(value, before[name])}

    def still(t: float) -> str:
        return "low" if t >= BOUND else "high"

    for step, t in enumerate((0.9, 0.1, 0.9, 0.2)):
        moved = update(step, t)
        assert len(moved) == 4 and not any(name.startswith(f"network.{still(t)}") for name in moved)
    again = RoleOptimizer(student(), config, 1e-2)
    again.load_state(optimizer.state())
    assert all(torch.equal(value, again.state()[name]) for name, value in optimizer.state().items())


def trained(config: RunConfig, times: list[list[float]], share: float) -> dict[str, Tensor]:
    """A student's weights and momenta after one update for each row of times, one sample for each time."""
    both = student()
    optimizer = RoleOptimizer(both, config, 1e-2)
    for step, row in enumerate(times):
        for t in row:
            x = torch.full((1, 6), t, dtype=torch.float64).sin()
            loss = both(x, torch.tensor([t], dtype=torch.float64), labels([t])).square().mean()
            torch.autograd.backward([loss], [torch.tensor(share, dtype=torch.float64)], inputs=both.parameters())
        optimizer.update(step)
    return {**both.state_dict(), **optimizer.state()}


def one_of_two(rank: int, config: RunConfig, times: list[list[float]], folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    save_file(trained(config, [[row[rank]] for row in times], 0.5), folder / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.soak
def test_two_processes_that_reach_different_experts_are_one_batch(tmp_path: Path) -> None:
    config = RunConfig(teacher="t", out=str(tmp_path), adam_weight_decay=0.1, max_grad_norm=0.5)
    # Both experts, one of them on both processes, and each process another one than before.
    times = [[0.9, 0.1], [0.8, 0.7], [0.3, 0.95], [0.2, 0.4]]
    # Not forked: a backward pass of an earlier test may have left threads, with which autograd refuses to run there.
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=one_of_two, args=(rank, config, times, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    whole = trained(config, times, 0.5)
    for rank in range(2):
        torch.testing.assert_close(load_file(tmp_path / f"{rank}.safetensors"), whole, rtol=1e-12, atol=1e-12)


# --- stock networks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flow() -> Recording:
    pipeline = tiny_flow()
    with shaken(pipeline.transformer):
        network = copy.deepcopy(pipeline.transformer)
    pipeline.register_modules(transformer=network.eval())
    return record(pipeline, prompt="the cat", max_sequence_length=8)


def stock_inputs(recording: Recording) -> tuple[Tensor, Tensor, object]:
    x = torch.randn(3, *recording.sample_shape, generator=torch.Generator().manual_seed(1))
    conditioning = recording.condition(prompts=["the cat"]).select([0] * 3)
    return x, torch.tensor([0.9, 0.2, 0.7], dtype=torch.float64), conditioning


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_several_adapters_of_one_backbone_are_routed_like_several_networks(
    flow: Recording, checkpointing: bool
) -> None:
    """The shape of a student with a phase for each part of the time."""
    backbone = Backbone(flow.network, 2, 4.0, gradient_checkpointing=checkpointing)
    phases = {name: adapter_role(name, backbone, flow) for name in ("first", "second")}
    both = ExpertsRole("student", {"first": (BOUND, phases["first"]), "second": (0.0, phases["second"])})
    x, t, conditioning = stock_inputs(flow)
    gradient = torch.randn(x.shape)
    found = both(x, t, conditioning)
    grads = torch.autograd.grad(found, both.parameters(), gradient)
    assert both.is_adapter and list(both.stock_network()) == ["first", "second"]
    start = 0
    for name, rows in (("first", [0, 2]), ("second", [1])):
        own = phases[name]
        merged = flow.recipe.call(
            backbone.merged(own.adapter), x[rows], flow.schedule.timestep(t[rows]), conditioning.select(rows)
        )
        x0 = x[rows] - t[rows].float().reshape(-1, 1, 1, 1) * merged
        torch.testing.assert_close(found[rows], x0, rtol=1e-4, atol=1e-4)
        alone = torch.autograd.grad(own(x[rows], t[rows], conditioning.select(rows)), own.parameters(), gradient[rows])
        torch.testing.assert_close(grads[start : start + len(alone)], alone, rtol=1e-5, atol=1e-5)
        start += len(alone)
    assert start == len(grads)


def test_one_head_sees_the_features_of_the_expert_whose_time_it_is(flow: Recording) -> None:
    roles = [make_role("critic", flow, trainable=True, autocast=torch.bfloat16) for _ in range(2)]
    both = ExpertsRole("critic", {"high": (BOUND, roles[0]), "low": (0.0, roles[1])})
    with torch.no_grad():
        for parameter in roles[1].parameters():
            parameter.add_(0.1)
    x, t, conditioning = stock_inputs(flow)
    tap = find_tap(roles[0].denoiser.network, lambda s: roles[0].denoiser.raw(s, t, conditioning), x)
    features = both.denoiser.features(x, t, conditioning, tap)
    for k, own in enumerate((roles[0], roles[1], roles[0])):
        alone = own.denoiser.features(x[k : k + 1], t[k : k + 1], conditioning.select([k]), tap)
        torch.testing.assert_close(features[k : k + 1], alone, rtol=2e-2, atol=2e-2)
    both.add("head", make_head(features, 0))
    both.added["head"](features).sum().backward()
    assert all(any(p.grad is not None and p.grad.any() for p in own.parameters()) for own in roles)
    assert {name.partition(".")[0] for name in both.state_dict()} == {"network", "head"}
