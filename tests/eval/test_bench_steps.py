"""Steps in forward passes: the arithmetic is that of the calls, and what is played alone is what was played."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_pipelines import tiny_stable_diffusion

from fewstep.cli import main
from fewstep.eval.bench import parts, steps
from fewstep.eval.bench.replay import Replay
from fewstep.eval.bench.runs import Case, Run, config_of, open_shape
from fewstep.eval.bench.table import Table
from fewstep.eval.memory.shapes import SHAPES, Shape
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.programs.teacher import Teacher

CPU = torch.device("cpu")
DMD2 = Case("dmd2", "dmd2", {"steps": 2}, (5, 6))


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    SHAPES["tiny"] = Shape(lambda world: tiny_stable_diffusion(), batch_size=2)
    try:
        yield open_shape("tiny", tmp_path_factory.mktemp("teacher"), CPU)
    finally:
        del SHAPES["tiny"]


def run_of(case: Case, teacher: Teacher, folder: Path) -> Run:
    return Run(case, teacher, config_of(case, folder, "tiny", cpu=True))


def measured(cases: Sequence[Case], folder: Path) -> None:
    found = steps.measure_cases(CPU, folder, 1, 60.0, cases, "tiny")
    assert [one.case for one in found] == list(cases)
    for one in found:
        assert one.seconds.median > 0 and one.optimizer.median > 0 and one.flops > 2.9
        assert one.ratio.median == pytest.approx(one.seconds.median / (one.flops + one.optimizer.median))
        assert one.networks is not None or one.case.method == "mean_flow"


@pytest.mark.soak
def test_steps_are_measured_with_full_copies_and_adapters(tmp_path: Path) -> None:
    measured([DMD2, Case("lora", "dmd2", {"steps": 2, "lora_rank": 2}, (6,))], tmp_path)


@pytest.mark.soak
def test_every_case_is_measured(tmp_path: Path) -> None:
    measured(steps.CASES, tmp_path)


def test_the_arithmetic_of_a_step_is_that_of_its_calls(tiny: Teacher, tmp_path: Path) -> None:
    """LoRA apart, a pass with its backward pass is three forward passes, but for the first layer's input."""
    run = run_of(DMD2, tiny, tmp_path)
    unit = steps.Unit(tiny, steps.Clock(CPU), 2)
    replay = Replay(run)
    assert replay.possible
    student, critic = replay.turns[5], replay.turns[6]
    assert (student, critic) == (["student", "critic"], ["critic"])
    for step in DMD2.steps:
        expected = 0.0
        for call in replay.calls[step]:
            expected += len(call.x) / 2 * (1 if call.updates is None else 3)
        assert steps.flops(partial(run.play, step)) / unit.flops == pytest.approx(expected, rel=0.02)
        assert steps.flops(partial(replay.play, step)) / unit.flops == pytest.approx(expected, rel=0.02)


def test_a_gradient_through_a_frozen_critic_goes_to_its_input(tiny: Teacher, tmp_path: Path) -> None:
    """SiD: teacher and critic are walked through in the student's turn, and the critic is trained in its own."""
    run = run_of(Case("sid", "sid", {"steps": 1}, (1,)), tiny, tmp_path)
    replay = Replay(run)
    flows = [(call.name, call.updates) for call in replay.calls[1]]
    scale = 1 if isinstance(run.method.teacher, GuidedDenoiser) else 0
    assert scale and flows == [
        ("student", None),
        ("critic", "critic"),
        ("student", "student"),
        ("teacher", "student"),
        ("critic", "student"),
    ]
    assert steps.flops(lambda: replay.play(1)) == pytest.approx(steps.flops(lambda: run.play(1)), rel=0.02)
    assert vars(run.method).get("turns") is None


def test_calls_with_a_tangent_are_not_played_alone(tiny: Teacher, tmp_path: Path) -> None:
    settings = {"steps": 2, "num_pairs": 2, "pair_steps": 1, "max_steps": 2, "apart": 1.0}
    assert not Replay(run_of(Case("mean_flow", "mean_flow", settings, (1,)), tiny, tmp_path)).possible


def test_the_command_writes_tables_and_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads, seen = torch.get_num_threads(), []

    def part(told: parts.Options) -> list[Table]:
        seen.append((told.full, torch.get_num_threads()))
        table = Table("A part", ("what", "how much"))
        table.add(["one", "1.0"], what="one", much=1.0)
        table.failures += ["one is too much"] * told.full
        return [table]

    monkeypatch.setitem(parts.PARTS, "steps", part)
    assert main(["bench", "--part", "steps", "--cpu", "--out", str(tmp_path)]) == 0
    assert main(["bench", "--part", "steps", "--cpu", "--out", str(tmp_path), "--full", "--threads", "2"]) == 1
    assert seen == [(False, 1), (True, 2)] and torch.get_num_threads() == threads
    assert "not as it should be: one is too much" in capsys.readouterr().out
    text = (tmp_path / "steps.json").read_text()
    assert '"much": 1.0' in text and torch.__version__ in text
    assert "| one | 1.0 |" in (tmp_path / "steps.md").read_text()
    assert main(["bench", "--part", "all", "--out", str(tmp_path)]) == 2
