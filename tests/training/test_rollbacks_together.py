"""A run of two processes goes back together: whoever has the trouble, and as one process with the same samples does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import TinyMethod, make_loop

from fewstep.errors import UserError
from fewstep.training import checkpoint
from fewstep.training.distributed import sum_over_processes
from tests.forked import well
from tests.training.loop_runs import config, rows

RUN = {"max_steps": 12, "rollbacks": 1, "checkpointing_steps": 2, "log_steps": 3, "ema_decay": 0.9}


class BadSample(TinyMethod):
    """One sample of the run's own draws, the fourth of those of step 7, has a gradient that is not finite."""

    BAD = 3

    def turns(self, step, batch):
        bad = (batch.draws.seed, step) == (0, 7) and self.BAD in batch.draws.indices
        self.poison = ("critic", 0) if bad else None
        yield from super().turns(step, batch)


class Summing(BadSample):
    """Its critic's loss is weighed by what all processes have, in each micro-batch; the bad sample is in the first."""

    BAD = 1

    def turns(self, step, batch):
        for turn in super().turns(step, batch):
            if turn.role == "critic":
                weight = torch.tensor([float(batch.size)])
                sum_over_processes([weight])
                turn.backward = [(loss * weight / weight, gradient) for loss, gradient in turn.backward]
            yield turn


class DrivenOut:
    """What samples show: they are driven out in steps 7 and 8, until that was gone back from."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, step: int, _pause: object) -> dict[str, float]:
        self.seen.append(step)
        wide = 5.0 if step in (7, 8) and self.seen.count(step) == 1 else 1.0
        names = ("std", "within", "between")
        both = {f"samples/student_{name}": wide for name in names} | {f"samples/teacher_{name}": 1.0 for name in names}
        return both | {"samples/apart": float(step)}


def train(
    out: Path,
    processes: int,
    make: Callable[[], TinyMethod],
    on_samples: Callable[[int, object], dict[str, float]] = lambda step, pause: {},
    **settings,
) -> None:
    """A run on so many processes, resumed where ``out`` holds a checkpoint; each leaves its weights."""

    def work(rank: int) -> None:
        method = make()
        shared = {**RUN, "batch_size": 4 // processes, **settings}
        loop = make_loop(method, config(out, **shared), on_samples=on_samples)
        if checkpoint.steps_in(loop.checkpoints):
            loop.resume()
        loop.run()
        roles = {name: role.state_dict() for name, role in method.roles.items()}
        every = {f"{name}.{key}": value for name, state in roles.items() for key, value in state.items()}
        save_file(every, out / f"weights_{rank}.safetensors")

    well(processes, work, out.parent / f"{out.name}_said")


def rollbacks(out: Path) -> list[tuple[int, int]]:
    noted = json.loads((out / "checkpoints" / "rollbacks.json").read_text())
    return [(one["from"], one["to"]) for one in noted]


def all_weights(out: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(out / f"weights_{rank}.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_gradient_of_one_process_sends_both_back_as_it_does_one_process_with_their_samples(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for out, processes in ((one, 1), (two, 2)):
        train(out, processes, lambda: BadSample(ema=True))
    assert rollbacks(one) == rollbacks(two) == [(8, 6)]
    assert [row["step"] for row in rows(two)] == [row["step"] for row in rows(one)] == [1, 3, 6, 9, 12]
    assert same(all_weights(two, 0), all_weights(two, 1))
    torch.testing.assert_close(all_weights(two), all_weights(one), rtol=1e-5, atol=1e-6)


def test_a_step_with_sums_over_processes_is_searched_by_all_of_them_alike(tmp_path: Path) -> None:
    """One of them finds what is not finite in its first micro-batch, and the other has two to ask with it."""
    train(tmp_path / "run", 2, lambda: Summing(ema=True), batch_size=1, gradient_accumulation_steps=2)
    assert rollbacks(tmp_path / "run") == [(8, 6)]
    assert same(all_weights(tmp_path / "run", 0), all_weights(tmp_path / "run", 1))
    said = (tmp_path / "run" / "checkpoints" / "rollbacks.json").read_text()
    assert "in the loss of the critic" in said


def test_what_went_back_on_two_processes_and_was_resumed_is_the_undisturbed_run(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, 2, lambda: BadSample(ema=True))
    for length in (9, 12):
        train(parts, 2, lambda: BadSample(ema=True), max_steps=length)
    assert rollbacks(parts) == [(8, 6)]
    assert same(all_weights(parts), all_weights(whole))


def test_what_the_first_process_alone_sees_in_its_samples_sends_both_back(tmp_path: Path) -> None:
    train(tmp_path / "run", 2, TinyMethod, DrivenOut(), stop_on="collapse", sample_steps=1)
    assert rollbacks(tmp_path / "run") == [(8, 6)]
    assert same(all_weights(tmp_path / "run", 0), all_weights(tmp_path / "run", 1))
    assert checkpoint.find_latest(tmp_path / "run" / "checkpoints").state["step"] == 12


def test_a_collapse_ends_both_where_nothing_is_to_be_gone_back(tmp_path: Path) -> None:
    def work(_rank: int) -> int:
        loop = make_loop(
            TinyMethod(), config(tmp_path, stop_on="collapse", sample_steps=1, max_steps=12), on_samples=DrivenOut()
        )
        with pytest.raises(UserError, match=r"over-saturated.*--resume --rollbacks 1"):
            loop.run()
        return 0 if loop.step == 8 else 1

    well(2, work, tmp_path / "said")
