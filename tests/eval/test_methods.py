"""Cells run: a training that is stopped goes on, what is finished stays, and what is said of it is counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fewstep.eval import methods
from fewstep.eval.benchmark.cell_results import Result, read_result, read_strip, write_result
from fewstep.eval.benchmark.cell_runs import Stopwatch, fresh_pipeline, network_calls, train
from fewstep.eval.benchmark.cells import Cell, CellPlan, Training, digest
from fewstep.fashion import teacher_path
from fewstep.training.monitor import Monitor

SETTINGS = {"gan_weight": 0.0, "max_steps": 4, "batch_size": 2, "critic_updates": 2, "checkpointing_steps": 1}
SETTINGS |= {"sample_steps": 0}
TINY = Training("dmd2", "dmd2", "fashion-sd", 2, at=(1, 2), settings=SETTINGS)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(TINY, 0, tmp_path_factory.mktemp("whole"))[0]


def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C falls where the loop has just done that step."""
    advance = Monitor.advance

    def stop(self: Monitor, done: int) -> None:
        advance(self, done)
        if done == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Monitor, "advance", stop)


@pytest.mark.soak
def test_a_stopped_training_goes_on_to_the_same_student(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stopped_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, 0, tmp_path)
    (folder,) = tmp_path.iterdir()
    before = json.loads((folder / "seconds.json").read_text())
    assert before["seconds"] > 0 and not before["finished"]
    student, seconds = train(TINY, 0, tmp_path)
    assert seconds > before["seconds"]
    mine, theirs = load_file(student / WEIGHTS), load_file(undisturbed / WEIGHTS)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.soak
def test_a_finished_training_is_not_run_again(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.eval.benchmark.cell_runs.distillation", None)
    work = undisturbed.parent.parent.parent
    assert train(TINY, 0, work)[0] == undisturbed


def test_a_killed_process_has_its_seconds_counted(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    trace = tmp_path / "run" / "metrics.jsonl"
    trace.write_text("{}")
    began = trace.stat().st_mtime - 70
    (tmp_path / "seconds.json").write_text(json.dumps({"seconds": 30.0, "since": began}))
    watch = Stopwatch(tmp_path / "seconds.json", tmp_path / "run")
    assert watch.seconds == pytest.approx(100)
    assert not watch.finished


def test_calls_are_those_of_all_steps() -> None:
    """Of 4 steps of 2 samples the student learns in 2, from a guided pair of the teacher; the critic learns in all."""
    calls = network_calls(TINY)
    assert calls["student"]["to_parameters"] == 2 * 2
    assert calls["teacher"] == {"no_grad": 2 * 2 * 2}
    assert calls["critic"] == {"no_grad": 2 * 2, "to_parameters": 4 * 2}


@pytest.mark.soak
def test_calls_hold_the_pairs_that_a_run_makes() -> None:
    settings = {"num_pairs": 8, "pair_steps": 3, "pair_solver": "heun", "max_steps": 5, "batch_size": 4}
    calls = network_calls(Training("reflow", "rectified_flow", "fashion-flow", 4, settings=settings))
    assert calls == {"student": {"to_parameters": 20.0}, "pairs": {"no_grad": 8 * 3 * 2 * 2}}
    images = {"data": "fashion", "variant": "alpha_flow", "max_steps": 5, "batch_size": 4}
    assert "pairs" not in network_calls(Training("mean", "mean_flow", "fashion-flow", 4, settings=images))


@pytest.mark.soak
def test_a_student_from_scratch_starts_from_fresh_weights(tmp_path: Path) -> None:
    fresh = load_file(fresh_pipeline("fashion-sd", 3, tmp_path) / WEIGHTS)
    theirs = load_file(teacher_path("fashion-sd") / WEIGHTS)
    assert fresh.keys() == theirs.keys()
    assert not torch.equal(fresh["conv_in.weight"], theirs["conv_in.weight"])
    few = {**SETTINGS, "max_steps": 1, "lr": 0.0, "ema_decay": 0.0, "adam_weight_decay": 0.0}
    scratch = Training("scratch", "dmd2", "fashion-sd", 1, settings=few, scratch=True, gated=False)
    student = load_file(train(scratch, 3, tmp_path)[0] / WEIGHTS)
    # Written in the precision of the teacher's files.
    assert all(torch.equal(student[name], fresh[name].to(student[name].dtype)) for name in fresh)


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def command(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line on a list of one training, whose work is the undisturbed one's."""
    monkeypatch.setattr(methods, "read_plan", lambda: CellPlan((TINY,), (1, 2), 20))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    work = undisturbed.parent.parent.parent
    where = ["--out", str(work), "--results", str(tmp_path / "results"), "--threads", "1"]
    return lambda *words: methods.main([*words, *where])


def test_cells_are_run_once_and_make_table_and_picture(command: Any, tmp_path: Path, capsys: Any) -> None:
    results = tmp_path / "results"
    assert command("--only", "dmd2*_1of2", "teacher_*") == 0
    printed = capsys.readouterr().out
    assert "| `dmd2` | `fashion-sd` | 1 | 1 |" in printed
    cell = Cell("fashion-sd", 1, 20, TINY)
    result = read_result(results, cell)
    assert result is not None and result.nfe == 1 and result.num == 20
    assert set(result.metrics) == {"fd_test", "agreement", "recall"}
    assert result.calls["teacher"] == {"no_grad": 8}
    assert {"torch", "fewstep"} <= set(result.versions)
    assert read_strip(results, cell).shape == (10, 1, 32, 32)
    assert (results / "methods.png").is_file()
    assert command("--only", "dmd2*_1of2", "teacher_*") == 0
    assert "[" not in capsys.readouterr().out.partition("|")[0]
    assert command("--list") == 0
    states = dict(reversed(line.split()[:2]) for line in capsys.readouterr().out.splitlines())
    expected = {"dmd2_fashion-sd_1of2.seed0": "done", "dmd2_fashion-sd_2of2.seed0": "missing"}
    assert states == {"teacher_fashion-sd_1": "done", "teacher_fashion-sd_2": "done", **expected}


def test_a_list_shows_the_calls_that_are_kept_and_counts_none_unasked(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def count(training: Training) -> dict[str, dict[str, float]]:
        counted.append(training.title)
        return {"student": {"no_grad": 4000, "to_parameters": 3}}

    monkeypatch.setattr(methods, "network_calls", count)
    cells = CellPlan((TINY, replace(TINY, name="other")), (1,), 20).cells()
    kept = [cell for cell in cells if cell.training == TINY][1]
    empty = Result(kept.name, 0, 20, 1, {}, {}, {"teacher": {"no_grad": 1234}}, {}, 1, kept.content(), "")
    write_result(tmp_path, kept, replace(empty, hash=digest(empty.content)), None)
    methods.show(cells, tmp_path)
    shown = [line for line in capsys.readouterr().out.splitlines() if "teacher_" not in line]
    # Cells of one training share what is kept of one of them.
    assert [line.split()[0] for line in shown] == ["missing", "done", "missing", "missing"] and not counted
    assert ["1,234 calls" in line for line in shown] == [True, True, False, False]
    methods.show(cells, tmp_path, count=True)
    assert counted == [replace(TINY, name="other").title] and capsys.readouterr().out.count("4,003 calls") == 2


def test_committed_cells_are_not_overwritten_by_cells_of_fewer_samples(capsys: Any) -> None:
    assert methods.main(["--num", "500", "--only", "sid*"]) == 2
    assert "with another --num give --results DIR, too" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "none*"], "--only 'none*' fits no cell"),
        (["--threads", "0", "--list"], "--threads and --num must be at least 1"),
        (["--table"], "holds no result of a present recipe"),
        (["--nothing"], "nothing"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    assert methods.main([*words, "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
