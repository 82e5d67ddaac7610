"""Signals: noted in the loop, obeyed by all processes after the same step; a second Ctrl-C ends at once."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from toys import TinyMethod

from fewstep.errors import Interrupted
from fewstep.training import checkpoint, stopping
from fewstep.training.distributed import Processes
from fewstep.training.stopping import Stopping
from tests.forked import forked
from tests.training.loop_runs import run


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """Ctrl-C counts, also where whoever started the tests lets it be passed over, as nohup does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Signalled(TinyMethod):
    """A method that gets these signals in its third step."""

    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.numbers = numbers

    def turns(self, step, batch):
        for number in self.numbers if step == 2 else ():
            os.kill(os.getpid(), number)
        yield from super().turns(step, batch)


def steps_after(out: Path, *numbers: int) -> list[int]:
    with pytest.raises(Interrupted):
        run(out, Signalled(*numbers))
    return checkpoint.steps_in(out / "checkpoints")


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stopping, "_AGAIN", -1.0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Signalled(signal.SIGINT, signal.SIGINT))
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [0]


def test_one_ctrl_c_that_a_launcher_passes_on_as_well_is_one(tmp_path: Path):
    assert steps_after(tmp_path, signal.SIGINT, signal.SIGINT) == [0, 3]


def test_repeated_terminations_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stopping, "_AGAIN", -1.0)
    assert steps_after(tmp_path, signal.SIGTERM, signal.SIGTERM) == [0, 3]


def test_a_signal_after_the_last_question_is_not_lost():
    asked = Stopping(Processes())
    with pytest.raises(KeyboardInterrupt), asked.noted():
        assert not asked.agreed()
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(tmp_path: Path):
    """Long before they log: a launcher that is told to go gives its processes seconds."""
    never = {"max_steps": 10**6, "log_steps": 10**6, "checkpointing_steps": 10**6}

    def work(rank: int) -> int:
        with pytest.raises(Interrupted):
            run(tmp_path / "out", Signalled(*[signal.SIGTERM] * rank), **never)
        return 130

    assert [end.code for end in forked(2, work, tmp_path)] == [130, 130]
    newest = checkpoint.find_latest(tmp_path / "out" / "checkpoints").state
    assert (newest["step"], newest["processes"]) == (3, 2)
