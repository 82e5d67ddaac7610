"""A signal in the middle of a sample grid: the grid is given up, and the run that goes on makes it first."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from toys import TinyMethod, make_loop

from fewstep.errors import Interrupted
from fewstep.programs.distillation import distill
from fewstep.training import checkpoint, samples
from fewstep.training.distributed import Processes
from fewstep.training.loop import Loop
from fewstep.training.stopping import Stopping
from tests.forked import forked, well
from tests.tiny_pipelines import tiny_dit
from tests.training.loop_runs import config, rows, weights

RUN = {"max_steps": 6, "sample_steps": 2, "log_steps": 3, "checkpointing_steps": 4}
CALLS = 5  # of a network, in a grid


class Grids:
    """Sample grids of :data:`CALLS` calls; before one of them, of one step, this process may get a signal."""

    def __init__(self, at: tuple[int, int] | None = None, number: int = signal.SIGTERM) -> None:
        self.at, self.number, self.calls, self.made = at, number, 0, []

    def __call__(self, step: int, pause) -> dict[str, float]:
        for call in range(CALLS):
            if self.at == (step, call):
                os.kill(os.getpid(), self.number)
            pause()
            self.calls += 1
        self.made.append(step)
        return {"samples/student_std": step / 7}


def loop_of(out: Path, grids: Grids, method: type[TinyMethod] = TinyMethod) -> Loop:
    loop = make_loop(method(ema=True), config(out, ema_decay=0.9, **RUN), on_samples=grids)
    if checkpoint.steps_in(loop.checkpoints):
        loop.resume()
    return loop


def log(out: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows(out)]


def same(ours: Loop, theirs: Loop) -> bool:
    roles = [one.method.roles for one in (ours, theirs)]
    return all(torch.equal(weights(roles[0][name]), weights(roles[1][name])) for name in ("student", "critic", "ema"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("step", "call"), [(2, 0), (4, 3), (6, 4)])
def test_a_grid_is_left_at_the_next_call_and_made_by_the_run_that_goes_on(
    tmp_path: Path, number: int, step: int, call: int
) -> None:
    whole, grids = loop_of(tmp_path / "whole", Grids()), Grids((step, call), number)
    whole.run()
    with pytest.raises(Interrupted):
        loop_of(tmp_path / "parts", grids).run()
    assert grids.made == list(range(2, step, 2)) and grids.calls == CALLS * len(grids.made) + call
    assert checkpoint.find_latest(tmp_path / "parts" / "checkpoints").state["step"] == step
    assert all(row["step"] < step for row in rows(tmp_path / "parts"))
    rest = loop_of(tmp_path / "parts", Grids())
    rest.run()
    assert rest.on_samples.made == list(range(step, 7, 2))
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    assert same(rest, whole)


def test_a_signal_in_the_step_before_leaves_the_grid_to_the_run_that_goes_on(tmp_path: Path) -> None:
    class Signalled(TinyMethod):
        def turns(self, step, batch):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield from super().turns(step, batch)

    grids = Grids()
    with pytest.raises(Interrupted):
        make_loop(Signalled(), config(tmp_path, **RUN), on_samples=grids).run()
    assert grids.made == [2] and checkpoint.find_latest(tmp_path / "checkpoints").state["step"] == 4


def test_a_run_that_was_told_to_go_in_its_grid_ends_like_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's row has a call for each of its steps, and before one of them the signal comes."""
    teacher, draw = tiny_dit(), samples.draw_sample
    settings = {"classes": "0-2", "steps": 2, "max_steps": 2, "batch_size": 4, "sample_steps": 2, "critic_updates": 1}
    settings |= {"cpu": True, "report_to": "none"}
    calls: list[int] = []

    def signalled(*given, on_step, **named):
        def before(step, x_t) -> None:
            calls.append(step)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            on_step(step, x_t)

        return draw(*given, on_step=before, **named)

    distill(teacher, "dmd2", out=str(tmp_path / "whole"), **settings)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(samples, "draw_sample", signalled)
        distill(teacher, "dmd2", out=str(tmp_path / "parts"), **settings)
    assert len(calls) == 3 and not (tmp_path / "parts" / "samples").exists()
    distill(teacher, "dmd2", out=str(tmp_path / "parts"), resume=True, **settings)
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    for name in ("samples/step_00000002.png", "student/transformer/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.soak
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_both_processes_of_a_run_leave_its_grid_when_the_second_hears_the_signal(
    tmp_path: Path, sharding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, draw, second = tiny_dit(), samples.draw_sample, tmp_path / "second"
    settings = {"classes": "0-2", "steps": 2, "max_steps": 2, "batch_size": 4, "sample_steps": 2, "critic_updates": 1}
    settings |= {"cpu": True, "report_to": "none", "sharding": sharding}

    def signalled(*given, on_step, **named):
        calls: list[int] = []

        def before(step, x_t) -> None:
            calls.append(step)
            if len(calls) == 2 and os.environ["RANK"] == "0":
                os.kill(int(second.read_text()), signal.SIGTERM)
                time.sleep(0.2)
            on_step(step, x_t)

        return draw(*given, on_step=before, **named)

    def launch(name: str, **more) -> list[int]:
        def work(rank: int) -> int:
            if rank:
                second.write_text(str(os.getpid()))
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # to whom it is handed on after the loop
            try:
                distill(teacher, "dmd2", out=str(tmp_path / name), **settings, **more)
            except Interrupted:
                return 130
            return 0

        return [end.code for end in forked(2, work, tmp_path / f"{name}_said")]

    assert launch("whole") == [0, 0]
    with monkeypatch.context() as patch:
        patch.setattr(samples, "draw_sample", signalled)
        assert launch("parts") == [130, 130]
    assert not (tmp_path / "parts" / "samples").exists()
    assert checkpoint.find_latest(tmp_path / "parts" / "checkpoints").state["owed"]
    assert launch("parts", resume=True) == [0, 0]
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    for name in ("samples/step_00000002.png", "student/transformer/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class Dying(TinyMethod):
    """Dies in its fourth step, before a checkpoint of it."""

    def turns(self, step, batch):
        if step == 3:
            raise RuntimeError("a bug")
        yield from super().turns(step, batch)


def test_what_died_after_an_owed_grid_makes_it_again_and_logs_it_once(tmp_path: Path) -> None:
    whole = loop_of(tmp_path / "whole", Grids())
    whole.run()
    with pytest.raises(Interrupted):
        loop_of(tmp_path / "parts", Grids((2, 1))).run()
    dying = loop_of(tmp_path / "parts", Grids(), Dying)
    with pytest.raises(RuntimeError, match="a bug"):
        dying.run()
    dying.monitor.close()
    assert dying.on_samples.made == [2] and [row["step"] for row in rows(tmp_path / "parts")] == [1, 2, 3]
    rest = loop_of(tmp_path / "parts", Grids())
    rest.run()
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    assert same(rest, whole)


@pytest.mark.parametrize(
    ("together", "signalled", "calls"),
    [(False, 0, [2, 0]), (False, 1, [0, 0]), (True, 0, [2, 2]), (True, 1, [2, 2]), (True, 0, [CALLS + 2, CALLS])],
)
def test_all_processes_leave_a_grid_at_the_same_call_whoever_hears_the_signal(
    tmp_path: Path, together: bool, signalled: int, calls: list[int]
) -> None:
    """Together all make the samples, and then the first one alone their pictures."""

    def work(rank: int) -> int:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        asked, done = Stopping(Processes(rank, 2)), []

        def samples() -> None:
            for call in range(2 * CALLS if rank == 0 else CALLS):
                if rank == signalled and call == calls[rank]:
                    os.kill(os.getpid(), signal.SIGTERM)
                asked.pause()
                done.append(call)

        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # to whom it is handed on after all
        with asked.noted(), pytest.raises(Interrupted):
            if rank == signalled and not together and rank:
                os.kill(os.getpid(), signal.SIGTERM)
            asked.of_main(samples, together)
        return 10 + len(done)

    assert [end.code for end in forked(2, work, tmp_path)] == [10 + count for count in calls]


def test_work_that_was_over_when_the_signal_came_is_kept(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        asked = Stopping(Processes(rank, 2))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with asked.noted():
            asked.of_main(lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert asked.agreed()

    well(2, work, tmp_path)
