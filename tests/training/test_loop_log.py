"""What the training loop says, when it says it, and what it never reads."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import TinyMethod, make_loop

from tests.training.loop_runs import config, rows, run, weights


def test_steps_are_logged_as_asked_and_the_first_and_last_always(tmp_path: Path):
    run(tmp_path, max_steps=11, log_steps=4)
    assert [row["step"] for row in rows(tmp_path)] == [1, 4, 8, 11]


def test_resuming_cuts_the_log_at_the_checkpoint_and_forgets_a_line_cut_short(tmp_path: Path):
    run(tmp_path, max_steps=4)
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 5, "seconds": 1.0}\n{"step": 6, "sec')
    loop = make_loop(TinyMethod(), config(tmp_path, max_steps=6))
    loop.resume()
    loop.run()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert all("critic/denoising" in row for row in rows(tmp_path))


def test_a_run_that_broke_off_between_two_log_lines_goes_on_with_the_same_lines(tmp_path: Path):
    class Breaking(TinyMethod):
        def turns(self, step, batch):
            if step == 3:
                raise MemoryError
            yield from super().turns(step, batch)

    settings = {"log_steps": 4, "checkpointing_steps": 3, "max_steps": 8}
    run(tmp_path / "whole", **settings)
    with pytest.raises(MemoryError):
        run(tmp_path / "broken", Breaking(), **settings)
    loop = make_loop(TinyMethod(), config(tmp_path / "broken", **settings))
    loop.resume()
    loop.run()
    whole, broken = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows(tmp_path / name)]
        for name in ("whole", "broken")
    )
    # The student's numbers of the line of step 4 were made in a step before the checkpoint.
    assert "student/matching" in whole[1]
    assert broken == whole


def test_samples_are_asked_for_when_due_and_at_the_end(tmp_path: Path):
    asked: list[int] = []

    def sampled(step: int, _pause: object) -> dict[str, float]:
        asked.append(step)
        return {"samples/student_std": step / 10}

    settings = {"max_steps": 7, "sample_steps": 3, "log_steps": 2}
    make_loop(TinyMethod(), config(tmp_path, **settings), on_samples=sampled).run()
    assert asked == [3, 6, 7]
    logged = {row["step"]: row.get("samples/student_std") for row in rows(tmp_path)}
    assert logged == {1: None, 2: None, 3: 0.3, 4: None, 6: 0.6, 7: 0.7}


def test_logging_less_changes_no_weight(tmp_path: Path):
    often, seldom = TinyMethod(), TinyMethod()
    run(tmp_path / "often", often, log_steps=1)
    run(tmp_path / "seldom", seldom, log_steps=100)
    for name in ("student", "critic"):
        assert torch.equal(weights(often.roles[name]), weights(seldom.roles[name]))


_READS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")


def test_nothing_is_read_back_from_the_device_in_a_step_that_does_not_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loop = make_loop(TinyMethod(ema=True), config(tmp_path, log_steps=5, max_steps=50, ema_decay=0.9))
    reads: list[str] = []

    def counted(name: str):
        original = getattr(Tensor, name)

        def read(self: Tensor, *args, **kwargs):
            caller = sys._getframe(1).f_code
            # Keyed draws are made on the CPU, wherever the roles live.
            if not caller.co_filename.endswith("draws.py"):
                reads.append(f"{name} in {caller.co_filename}:{caller.co_name}")
            return original(self, *args, **kwargs)

        return read

    for name in _READS:
        monkeypatch.setattr(Tensor, name, counted(name))
    by_step = []
    for _ in range(10):
        reads.clear()
        loop.one_step()
        by_step.append(list(reads))
    loop.monitor.close()
    logging = [bool(found) for found in by_step]
    assert logging == [True, False, False, False, True, False, False, False, False, True], by_step
