"""What is counted while steps run: every method costs what it declares, and the teacher stores nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tiny_pipelines import tiny_stable_diffusion
from torch import Tensor
from toys import TinyMethod, TinyNetwork, labels, make_loop

from fewstep.conditioning.conditioning import Conditioning
from fewstep.config.run import RunConfig
from fewstep.data.batch import Batch
from fewstep.diffusion.draws import Draws
from fewstep.eval.bench.floors import declared
from fewstep.programs.methods import method_class, methods
from fewstep.programs.pairs import pairs_of_run
from fewstep.programs.planning.call_counts import CallCounter, Calls, forward_passes
from fewstep.programs.planning.counting import count_calls
from fewstep.programs.workbench import Workbench, open_workbench
from fewstep.training.method import Method, Turn
from tests.programs.call_cases import SETTINGS, VARIANTS

RUN = {"steps": 4, "batch_size": 2, "log_steps": 100, "report_to": "none", "cpu": True}
ROLES = {
    "copies": {},
    "checkpointed copies": {"gradient_checkpointing": True},
    "adapters": {"lora_rank": 2},
    "checkpointed adapters": {"lora_rank": 2, "gradient_checkpointing": True, "ema_decay": 0.5},
    "full critic": {"lora_rank": 2, "full_critic": True},
}


def cases() -> Iterator[Any]:
    """One method shows that the kind of roles is of no matter; others play on two kinds, their variants on one."""
    for method in methods():
        for place, (variant, settings) in enumerate({"plain": {}, **VARIANTS.get(method, {})}.items()):
            two = ["copies", "checkpointed adapters"]
            kinds = list(ROLES) if (method, variant) == ("dmd2", "gan") else two[place % 2 :][:1] if place else two
            for roles in kinds:
                short = roles == "copies" and (not place or (method, variant) == ("dmd2", "gan"))
                marks = () if short else pytest.mark.soak
                yield pytest.param(method, settings | ROLES[roles], id=f"{method}-{variant}-{roles}", marks=marks)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images with captions."""
    folder = tmp_path_factory.mktemp("data")
    for name in "ab":
        Image.new("RGB", (16, 16), (50, 90, 200)).save(folder / f"{name}.png")
    rows = [{"file_name": f"{name}.png", "text": f"a {name}"} for name in "ab"]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    return folder


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """A guided teacher with a text encoder, recorded once: what every run below begins with."""
    out = str(tmp_path_factory.mktemp("teacher"))
    settings = {**RUN, "data": str(data), "prompts": str(data / "prompts.txt")}
    return open_workbench(RunConfig(teacher="tiny", out=out, **settings), "cpu", tiny_stable_diffusion())


@pytest.fixture
def distil(teacher: Workbench, data: Path, tmp_path: Path) -> Callable[..., tuple[Workbench, Method]]:
    """Makes a run of a method, as the command line does."""

    def make(name: str, **settings) -> tuple[Workbench, Method]:
        settings = RUN | SETTINGS.get(name, {}) | settings | {"teacher": "tiny", "out": str(tmp_path)}
        settings |= {"prompts": "prompts.txt", "data": str(data) if settings.get("data") else None}
        run = copy.copy(teacher)
        run.config = method_class(name).Config(**settings)
        return run, method_class(name).prepare(run.config, run)

    return make


def play(run: Workbench, method: Method, counter: CallCounter) -> None:
    """The real loop."""
    pairs = None
    if (wanted := run.config.pairs_wanted) is not None:
        pairs = pairs_of_run(wanted, run, method.roles["teacher"], {}, Accelerator(cpu=True), lambda: None)
    with counter:
        shape = run.recording.sample_shape
        make_loop(method, run.config, shape, conditions=run.conditions, real=run.real, pairs=pairs).run()


def batch_of(run: Workbench, step: int) -> Batch:
    """A batch to ask a method for its declaration with: only its draws and its size say something of the cost."""
    draws = Draws(run.config.seed, step, range(run.config.batch_size))
    return Batch(run.config.batch_size, run.recording.sample_shape, run.conditions.select([0, 1]), draws, None, False)


def same(found: dict[str, Calls], expected: dict[str, Calls]) -> bool:
    numbers = [{name: vars(calls) for name, calls in one.items()} for one in (found, expected)]
    return numbers[0].keys() == numbers[1].keys() and all(numbers[0][n] == pytest.approx(numbers[1][n]) for n in found)


@pytest.mark.parametrize(("name", "settings"), cases())
def test_a_method_costs_no_more_than_its_floor_and_encodes_no_text(name: str, settings: dict, distil: Callable) -> None:
    run, method = distil(name, max_steps=5, **settings)
    counter = CallCounter(
        method, {"text_encoder": run.recording.pipeline.text_encoder, "vae": run.recording.pipeline.vae}
    )
    play(run, method, counter)
    assert counter.steps == list(range(5))
    compared = [step for step in counter.steps if step not in counter.logged]
    assert len(compared) == 3
    for step in compared:
        assert same(counter.calls(step), declared(method, step, batch_of(run, step))), step
        back = {n: c.to_parameters + c.to_inputs + c.jvp_to_parameters for n, c in counter.calls(step).items()}
        assert counter.backwards(step) == {n: count for n, count in back.items() if count}
        assert counter.wasted(step) == {}
    # On stand-ins for the networks the same is counted.
    counted = count_calls(run.config, name, run.recording, compared)
    assert all(same(counted[step], counter.calls(step)) for step in compared)
    assert all(counter.beside_calls(step)["text_encoder"] == 0 for step in counter.steps)
    assert counter.outside() == {}


def test_micro_batches_are_one_step_of_more_samples(distil: Callable) -> None:
    run, method = distil("dmd2", max_steps=3, gradient_accumulation_steps=2)
    counter = CallCounter(method)
    play(run, method, counter)
    assert same(counter.calls(1), declared(method, 1, batch_of(run, 1)))


def test_guided_pairs_in_two_calls_cost_the_same(distil: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run, method = distil("dmd2", max_steps=4)
    monkeypatch.setattr(Conditioning, "compatible", staticmethod(lambda a, b: False))
    counter = CallCounter(method)
    play(run, method, counter)
    assert counter.calls(2)["teacher"] == Calls(no_grad=2)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_dmd2_costs_the_floor_of_its_paper(distil: Callable, lora_rank: int) -> None:
    """r critic updates and one of the student cost r (4 + 6h) + 5 + 2h forward passes; h: the share up to the tap.

    A critic update: a sample 1, denoising 1 + 2, real and fake features 2 h (1 + 2). The student's: its own backward
    pass 2, guided teacher 2, critic 1, the features of its sample h (1 + 1). The student's earlier steps, of which
    there are k with k uniform on 0..N-1, cost r (N - 1) / 2 in the mean.
    """
    updates, share = 5, 0.5
    run, method = distil(
        "dmd2", max_steps=1 + 2 * updates, critic_updates=updates, gan_weight=0.1, data=True, lora_rank=lora_rank
    )
    counter = CallCounter(method)
    play(run, method, counter)
    period = range(updates, 2 * updates)  # the first step is logged
    assert counter.logged.isdisjoint(period)
    total = sum(forward_passes(counter.calls(step), share) for step in period)
    earlier = sum(batch_of(run, step).draws.shared_integer("student_step", 0, run.config.steps) for step in period)
    assert total - earlier == updates * (4 + 6 * share) + 5 + 2 * share == 41
    many = [declared(method, step, batch_of(run, step))["student"] for step in range(500)]
    mean = sum(calls.no_grad + calls.to_parameters - 1 for calls in many) / len(many)
    assert mean == pytest.approx((run.config.steps - 1) / 2, abs=0.1)


# --- what the frozen teacher stores -----------------------------------------------------------------------------------


def stored_by(method: Method, name: str, run: Callable[[], None]) -> tuple[int, int]:
    """How often a role was called while `run` ran, and how many bytes these calls kept for a backward pass."""
    denoiser, counted = method.roles[name].denoiser, [0, 0]
    raw = denoiser.raw

    def pack(tensor: Tensor) -> Tensor:
        counted[1] += tensor.nbytes
        return tensor

    def watched(*arguments) -> Tensor:
        counted[0] += 1
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return raw(*arguments)

    denoiser.raw = watched
    try:
        run()
    finally:
        del denoiser.raw
    return counted[0], counted[1]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_frozen_teacher_stores_nothing(distil: Callable, lora_rank: int) -> None:
    run, method = distil("dmd2", max_steps=2, lora_rank=lora_rank, gan_weight=0.1, data=True)
    for name, stores in (("teacher", False), ("student", True), ("critic", True)):
        calls, stored = stored_by(method, name, lambda: play(run, method, CallCounter(method)))
        assert calls > 0
        assert (stored > 0) == stores, name


def test_a_teacher_that_is_asked_with_a_gradient_is_seen(distil: Callable) -> None:
    run, method = distil("dmd2", max_steps=2, lora_rank=2)
    matched = method.matching
    matching = type(matched).__call__.__wrapped__  # without its no_grad
    method.matching = lambda x0, batch, called_at: torch.enable_grad()(matching)(
        matched, x0.clone().requires_grad_(), batch, called_at
    )
    counter = CallCounter(method)
    assert stored_by(method, "teacher", lambda: play(run, method, counter))[1] > 0
    assert counter.wasted(0)["teacher"] == 2


# --- the counter itself -----------------------------------------------------------------------------------------------


def one_step(method: Method, counter: CallCounter, turns: Callable | None = None) -> None:
    if turns is not None:
        method.turns = turns
    with counter:
        for turn in method.turns(0, Batch(2, (6,), labels([0.0, 1.0]), Draws(0, 0, range(2)), None, False)):
            parameters = method.roles[turn.role].parameters()
            torch.autograd.backward(*zip(*turn.backward), inputs=parameters)


def test_what_flows_back_decides_and_not_what_could() -> None:
    """SiD's student: teacher and critic are walked through to their input, in one graph with the student."""
    method = TinyMethod()
    t = torch.full((2,), 0.5, dtype=torch.float64)

    def turns(step: int, batch: Batch):
        x0 = method.roles["student"](batch.draws.normal("noise", (6,)), t, batch.conditioning)
        verdicts = [method.roles[name](x0, t, batch.conditioning) for name in ("teacher", "critic")]
        yield Turn("student", [((verdicts[0] - verdicts[1]).square().mean(), None)])
        loss = method.roles["critic"](x0.detach(), t, batch.conditioning).square().mean()
        method.roles["critic"](x0.detach(), t, batch.conditioning)  # a graph for nothing
        yield Turn("critic", [(loss, None)])

    counter = CallCounter(method)
    one_step(method, counter, turns)
    expected = {
        "student": Calls(to_parameters=1),
        "teacher": Calls(to_inputs=1),
        "critic": Calls(no_grad=1, to_parameters=1, to_inputs=1),
    }
    assert counter.calls(0) == expected
    assert counter.wasted(0) == {"critic": 1}
    assert counter.backwards(0) == {"student": 1, "teacher": 1, "critic": 2}
    assert forward_passes(expected) == 3 + 2 + (1 + 3 + 2)


def test_a_tangent_is_counted_apart() -> None:
    method = TinyMethod()
    student = method.roles["student"]

    def turns(step: int, batch: Batch):
        x, t = torch.randn(2, 6), torch.full((2,), 0.5, dtype=torch.float64)
        with torch.no_grad():
            torch.func.jvp(lambda x, t: student(x, t, batch.conditioning), (x, t), (x, torch.zeros_like(t)))
            torch.func.jvp(lambda t: student(x, t, batch.conditioning), (t,), (torch.ones_like(t),))
        return iter(())

    counter = CallCounter(method)
    one_step(method, counter, lambda step, batch: (yield from turns(step, batch)))
    assert counter.calls(0) == {"student": Calls(jvp=2)}


def test_everything_is_as_before_when_it_closes(tmp_path: Path) -> None:
    method, text_encoder = TinyMethod(), TinyNetwork(6)
    before = {name: dict(vars(role.denoiser)) for name, role in method.roles.items()}
    counter = CallCounter(method, {"text_encoder": text_encoder})
    with pytest.raises(ZeroDivisionError), counter:
        text_encoder(torch.zeros(1, 6), torch.zeros(1), torch.zeros(1))
        raise ZeroDivisionError
    assert "turns" not in vars(method)
    assert {name: dict(vars(role.denoiser)) for name, role in method.roles.items()} == before
    assert all(not p._backward_hooks for role in method.roles.values() for p in role.parameters())
    text_encoder(torch.zeros(1, 6), torch.zeros(1), torch.zeros(1))
    assert counter.beside_calls(None) == {"text_encoder": 1}


def test_calls_between_steps_belong_to_no_step() -> None:
    method = TinyMethod()
    counter = CallCounter(method)
    with counter:
        method.roles["student"](torch.zeros(3, 6), torch.full((3,), 0.5), labels([0.0, 1.0, 1.0]))
    assert (counter.steps, counter.outside()) == ([], {"student": 3})
