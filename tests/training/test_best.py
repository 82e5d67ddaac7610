"""The best evaluation of a run: its checkpoint is kept, and too many without a better one end the run."""

import json
import logging
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toys import TinyMethod, make_loop

from fewstep.errors import Interrupted, UserError
from fewstep.training import checkpoint
from fewstep.training.best import Measure
from fewstep.training.loop import Loop
from tests.faults import Faults, every_fault
from tests.training.loop_runs import config, rows, weights

LOWEST = Measure("fd", highest=False, samples=16, evaluator="toy")
NAN = float("nan")


def loop_of(
    out: Path,
    numbers: Mapping[int, float],
    method: TinyMethod | None = None,
    measure: Measure | None = LOWEST,
    **settings,
) -> Loop:
    """A run whose evaluations give these numbers by step, and that goes on where there is a checkpoint."""
    chosen = config(out, **{"max_steps": 6, "eval_steps": 1, "checkpointing_steps": 3, **settings})
    metric = "fd" if measure is None else measure.metric
    loop = make_loop(
        method or TinyMethod(),
        chosen,
        on_evaluation=lambda step, pause: pause() or {f"eval/{metric}": numbers[step]},
        measure=measure,
    )
    if checkpoint.steps_in(loop.checkpoints):
        loop.resume()
    return loop


def run(out: Path, numbers: Mapping[int, float], method: TinyMethod | None = None, **settings) -> Loop:
    loop = loop_of(out, numbers, method, **settings)
    loop.run()
    return loop


def curve(out: Path, name: str = "eval/fd") -> dict[int, float]:
    return {row["step"]: row[name] for row in rows(out) if name in row}


def best(out: Path) -> tuple[int, float] | None:
    """Step and number of what is kept, whose checkpoint is whole and the only one there."""
    folder = out / "checkpoint_best"
    if not (folder / "best.json").exists():
        return None
    told = json.loads((folder / "best.json").read_text())
    assert checkpoint.steps_in(folder) == [told["step"]]
    assert checkpoint.find_step(folder, told["step"]).state["step"] == told["step"]
    assert sorted(path.name for path in folder.iterdir()) == ["best.json", f"step_{told['step']:08d}"]
    return told["step"], told["value"]


def taken(loop: Loop) -> str:
    """The student gets the weights of the best evaluation."""
    return loop.best.load(loop.method.roles["student"], loop.method.roles, loop.holding)


#: The best is that of step 2.
NUMBERS = {0: 9.0, 1: 8.0, 2: 5.0, 3: 7.0, 4: 6.0, 5: 5.0, 6: 5.5}


def test_evaluations_are_logged_from_the_start_to_the_end_and_the_best_ones_checkpoint_stays(tmp_path: Path):
    method = TinyMethod()
    at_two = {}

    class Noting(TinyMethod):
        def turns(self, step, batch):
            if step == 2:
                at_two["student"] = weights(self.roles["student"]).clone()
            yield from super().turns(step, batch)

    method = Noting()
    loop = run(tmp_path, NUMBERS, method, checkpoints_total_limit=1)
    assert curve(tmp_path) == NUMBERS
    assert best(tmp_path) == (2, 5.0)
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [6]
    line = taken(loop)
    assert line == "the student that is written is the best one: fd 5 in step 2"
    assert torch.equal(weights(method.roles["student"]), at_two["student"])


def test_a_run_that_was_killed_before_its_first_checkpoint_has_one_line_of_its_start(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "seconds": 1.0, "eval/fd": 9.0}\n')
    run(tmp_path, NUMBERS, max_steps=1)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1]


def test_evaluations_are_due_every_so_many_steps_and_at_the_end(tmp_path: Path):
    run(tmp_path, NUMBERS, eval_steps=4, max_steps=6, log_steps=100)
    assert list(curve(tmp_path)) == [0, 4, 6]


def test_without_evaluations_nothing_is_kept(tmp_path: Path):
    run(tmp_path, {}, measure=None, eval_steps=0)
    assert not (tmp_path / "checkpoint_best").exists() and list(curve(tmp_path)) == []


def test_the_highest_number_may_be_the_best(tmp_path: Path):
    run(tmp_path, NUMBERS, measure=replace(LOWEST, highest=True), max_steps=4)
    assert best(tmp_path) == (0, 9.0)


def test_evaluations_change_no_weight(tmp_path: Path):
    with_them, without = TinyMethod(ema=True), TinyMethod(ema=True)
    run(tmp_path / "with", NUMBERS, with_them, ema_decay=0.9)
    run(tmp_path / "without", {}, without, measure=None, eval_steps=0, ema_decay=0.9)
    for name in ("student", "critic", "ema"):
        assert torch.equal(weights(with_them.roles[name]), weights(without.roles[name]))


def test_the_files_of_the_best_take_no_room_of_their_own(tmp_path: Path):
    run(tmp_path, NUMBERS, max_steps=2)
    two = [tmp_path / name / "step_00000002" / "student.safetensors" for name in ("checkpoints", "checkpoint_best")]
    assert os.path.samefile(*two)


def test_on_a_disk_whose_files_have_one_name_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    run(tmp_path, NUMBERS, max_steps=2)
    assert best(tmp_path) == (2, 5.0)


# --- the end before the end ------------------------------------------------------------------------------------------


def test_a_run_ends_when_no_evaluation_was_better_for_long_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "fewstep"):
        loop = run(tmp_path, NUMBERS, eval_patience=2)
    assert loop.step == 4 and list(curve(tmp_path)) == [0, 1, 2, 3, 4]
    assert caplog.messages == [
        "the run ends after step 4 of 6: the last 2 evaluations were no better, the best was fd 5 in step 2 "
        "(--eval_patience)"
    ]
    assert checkpoint.steps_in(tmp_path / "checkpoints")[-1] == 4
    again = run(tmp_path, NUMBERS, eval_patience=2)  # a kill came before the export
    assert again.step == 4
    assert run(tmp_path, NUMBERS, eval_patience=3).step == 5
    assert run(tmp_path, NUMBERS, eval_patience=0).step == 6
    assert best(tmp_path) == (2, 5.0)


def test_a_number_that_is_not_finite_ends_a_run_and_is_never_the_best(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with pytest.raises(UserError, match="eval/fd is nan in step 2, and not a finite number; stopped"):
        run(tmp_path / "nan", {0: 3.0, 1: 4.0, 2: NAN})
    with pytest.raises(UserError, match="eval/fd is nan in step 0, and not a finite number; stopped"):
        run(tmp_path / "start", {0: NAN})
    assert best(tmp_path / "nan") == (0, 3.0)
    settings = {"stop_on": "never", "max_steps": 3}
    loop = run(tmp_path / "never", {0: NAN, 1: NAN, 2: 4.0, 3: NAN}, **settings)
    assert best(tmp_path / "never") == (2, 4.0) and loop.best.since == 1
    with caplog.at_level(logging.INFO, "fewstep"):
        loop = run(tmp_path / "none", dict.fromkeys(range(4), NAN), **settings, eval_patience=3)
    assert loop.step == 2 and best(tmp_path / "none") is None
    assert "none gave a finite number" in caplog.messages[-1]
    assert "the last student is written" in taken(loop)


# --- runs that go on -------------------------------------------------------------------------------------------------


def state(out: Path) -> tuple[dict, list[dict[str, float]], tuple[int, float] | None]:
    """What a run leaves: the newest checkpoint's files and evaluations, its log, and the best."""
    newest = checkpoint.find_latest(out / "checkpoints").state
    log = [{name: value for name, value in row.items() if name != "seconds"} for row in rows(out)]
    return {name: newest[name] for name in ("step", "files", "evaluation")}, log, best(out)


@pytest.mark.parametrize(("stop", "end"), [(0, 5), (2, 5), (3, 5), (4, 5), (1, 6), (5, 6)])
def test_a_resumed_run_knows_the_best_and_its_patience_to_the_bit(tmp_path: Path, stop: int, end: int):
    numbers = NUMBERS if end == 5 else {**NUMBERS, 5: 1.0}

    class Breaking(TinyMethod):
        def turns(self, step, batch):
            if step == stop:
                raise MemoryError
            yield from super().turns(step, batch)

    settings = {"eval_patience": 3, "checkpointing_steps": 2}
    run(tmp_path / "whole", numbers, **settings)
    with pytest.raises(MemoryError):
        run(tmp_path / "parts", numbers, Breaking(), **settings)
    loop = run(tmp_path / "parts", numbers, **settings)
    assert state(tmp_path / "parts") == state(tmp_path / "whole")
    assert loop.step == end


@pytest.mark.parametrize("stop", [0, 2, 6])
def test_a_signal_leaves_an_evaluation_that_is_then_made_first(tmp_path: Path, stop: int):
    settings = {"checkpointing_steps": 4}
    run(tmp_path / "whole", NUMBERS, **settings)
    loop, asked = loop_of(tmp_path / "parts", NUMBERS, **settings), []

    def told(step: int, pause: Callable[[], None]) -> dict[str, float]:
        asked.append(step)
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        pause()
        return {"eval/fd": NUMBERS[step]}

    loop.on_evaluation = lambda pause: told(loop.step, pause)
    with pytest.raises(Interrupted):
        loop.run()
    assert asked == list(range(stop + 1))
    assert not (stop and stop in curve(tmp_path / "parts"))
    run(tmp_path / "parts", NUMBERS, **settings)
    assert state(tmp_path / "parts") == state(tmp_path / "whole")


@pytest.mark.parametrize(
    "kind", [pytest.param("death", marks=pytest.mark.soak), "power", pytest.param("full", marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("on", ["checkpoint_best", pytest.param("", marks=pytest.mark.soak)], ids=["its", "every"])
def test_a_fault_at_any_operation_costs_no_best_evaluation(tmp_path: Path, kind: str, on: str):
    numbers, settings = {0: 3.0, 1: 2.0, 2: 2.5}, {"max_steps": 2, "checkpoints_total_limit": 1}

    def work(out: Path) -> Loop:
        return run(out, numbers, **settings)

    work(tmp_path)
    expected = state(tmp_path)
    best_so_far = {None, (0, 3.0), (1, 2.0)}

    def check(out: Path, fault: Faults) -> None:
        if (folder := out / "checkpoint_best" / "best.json").exists():  # then its checkpoint is whole
            told = json.loads(folder.read_text())
            assert checkpoint.find_step(folder.parent, told["step"]), fault.happened
            assert (told["step"], told["value"]) in best_so_far, fault.happened
        work(out)
        assert state(out) == expected, fault.happened

    every_fault(kind, work, check, at_least=20, on=on)


def test_a_best_one_that_came_after_a_damaged_checkpoint_is_made_again(tmp_path: Path):
    run(tmp_path, {**NUMBERS, 5: 1.0}, max_steps=5)
    assert best(tmp_path) == (5, 1.0)
    (tmp_path / "checkpoints" / "step_00000005" / "state.json").write_text("{}")
    loop = loop_of(tmp_path, {**NUMBERS, 5: 1.0}, max_steps=5)
    assert loop.step == 3 and best(tmp_path) is None  # the checkpoint of step 2 is gone
    loop.run()
    assert best(tmp_path) == (5, 1.0)


class BadBatch(TinyMethod):
    """One batch of the run's own draws has a gradient that is not finite."""

    def turns(self, step, batch):
        self.poison = ("critic", 0) if (batch.draws.seed, step) == (0, 4) else None
        yield from super().turns(step, batch)


@pytest.mark.parametrize(
    ("numbers", "kept"),
    [
        ([9.0, 8.0, 5.0, 7.0, 7.0, 7.0, 7.0], (2, 5.0)),  # before what is gone back to
        ([9.0, 8.0, 8.5, 7.0, 7.5, 8.0, 9.0], (3, 7.0)),  # that itself
    ],
)
def test_a_roll_back_keeps_the_best_from_before(tmp_path: Path, numbers: list[float], kept: tuple[int, float]):
    loop = run(tmp_path, dict(enumerate(numbers)), BadBatch(), rollbacks=1)
    assert [one["to"] for one in loop.watch.rollbacks] == [3]
    assert best(tmp_path) == kept and loop.best.since == 6 - kept[0]
    assert curve(tmp_path) == dict(enumerate(numbers))


def test_a_roll_back_forgets_what_came_after(tmp_path: Path):
    numbers = {**NUMBERS, 4: 1.0}
    loop = loop_of(tmp_path, numbers, max_steps=4)
    loop.run()
    assert best(tmp_path) == (4, 1.0)
    checkpoint.remove_after(tmp_path / "checkpoints", 3)  # as a roll-back does before it resumes
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [3]
    loop = loop_of(tmp_path, {**numbers, 4: 8.0}, max_steps=4)
    assert best(tmp_path) is None and loop.best.mark is None and loop.best.since == 0
    loop.run()
    assert best(tmp_path) == (4, 8.0)


def test_evaluations_of_another_kind_are_not_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run(tmp_path, NUMBERS, max_steps=4)
    other = replace(LOWEST, samples=32)
    with caplog.at_level(logging.INFO, "fewstep"):
        loop = run(tmp_path, {5: 8.0, 6: 9.0}, measure=other)
    assert "other evaluations than before: that of fd 5 in step 2 is no longer the best" in caplog.messages[0]
    assert best(tmp_path) == (5, 8.0) and loop.best.since == 1


def test_a_while_without_evaluations_forgets_nothing(tmp_path: Path):
    run(tmp_path, NUMBERS, max_steps=4)
    run(tmp_path, {}, measure=None, eval_steps=0, max_steps=5)
    assert best(tmp_path) == (2, 5.0)
    loop = run(tmp_path, {6: 6.0})
    assert best(tmp_path) == (2, 5.0) and loop.best.since == 3


@pytest.mark.parametrize("content", ["", "[]", '{"step": 2}'])
def test_a_best_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path, content: str):
    run(tmp_path, NUMBERS, max_steps=2)
    (tmp_path / "checkpoint_best" / "best.json").write_text(content)
    with pytest.raises(UserError, match=r"best\.json is not what was written .* remove it") as caught:
        loop_of(tmp_path, NUMBERS)
    assert "\n" not in str(caught.value)


def test_a_damaged_best_is_not_exported(tmp_path: Path):
    loop = run(tmp_path, NUMBERS)
    file = tmp_path / "checkpoint_best" / "step_00000002" / "student.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"is not whole: student\.safetensors is not what was written"):
        taken(loop)
