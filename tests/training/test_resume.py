"""A run that is killed, or shared out over processes, is the run that was not."""

import json
import os
import random
import signal
from pathlib import Path
from threading import Timer

import pytest
import torch
from tiny_run import kill_and_resume, train

from fewstep.training import checkpoint, distributed, fate
from fewstep.training.distributed import join_launch
from fewstep.training.fate import shared_fate
from tests.checkpoints import load_latest
from tests.forked import Ended, forked, well


def metrics(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    return rows


def files(out: Path) -> dict:
    state, _ = load_latest(out / "checkpoints")
    return state["files"]


def kill_and_compare(tmp_path: Path, kills: int, max_steps: int) -> int:
    settings = {"batch_size": 8, "max_steps": max_steps, "log_steps": 4, "checkpointing_steps": 3}
    hits = kill_and_resume(tmp_path, settings, kills, seed=1)
    compare_killed(tmp_path, max_steps)
    return hits


def compare_killed(folder: Path, max_steps: int) -> None:
    whole, killed = folder / "whole", folder / "killed"
    assert checkpoint.steps_in(killed / "checkpoints")[-1] == max_steps
    assert files(killed) == files(whole)  # sizes and SHA-256 of all weights and optimizer states
    steps = [row["step"] for row in metrics(killed)]
    assert len(steps) == len(set(steps))
    assert metrics(killed) == metrics(whole)


def test_killed_runs_go_on_and_end_bit_for_bit_like_the_undisturbed_one(tmp_path: Path):
    assert kill_and_compare(tmp_path, kills=3, max_steps=90) >= 2


@pytest.mark.soak
def test_twenty_kills_change_nothing(tmp_path: Path):
    assert kill_and_compare(tmp_path, kills=20, max_steps=2500) >= 15


def launch(out: Path, max_steps: int, victim: int | None = None, moment: float = 0.0) -> list[Ended]:
    """Two processes that train or go on; one of them may be killed after so many seconds."""

    def work(rank: int) -> None:
        with shared_fate(join_launch(cpu=True)):
            if rank == victim:
                Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
            train(out, {"batch_size": 4, "max_steps": max_steps, "log_steps": 4, "checkpointing_steps": 3})

    return forked(2, work, out.parent / "said")


@pytest.mark.parametrize(("kills", "max_steps"), [(4, 60), pytest.param(20, 600, marks=pytest.mark.soak)])
def test_one_of_two_processes_is_killed_and_the_run_ends_bit_for_bit_like_the_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int, max_steps: int
):
    monkeypatch.setattr(fate, "_NEWS", 4.0)
    undisturbed = launch(tmp_path / "whole", max_steps)
    assert [end.code for end in undisturbed] == [0, 0], undisturbed
    moments, hits, longest = random.Random(0), 0, max(end.seconds for end in undisturbed)
    for kill in range(8 * kills):
        if hits == kills:
            break
        victim = kill % 2
        ended = launch(tmp_path / "killed", max_steps, victim, moments.uniform(0, longest / kills))
        hits += ended[victim].code == -signal.SIGKILL
        assert ended[1 - victim].code in (0, 1), ended  # it ended by itself
    assert [end.code for end in launch(tmp_path / "killed", max_steps)] == [0, 0]
    compare_killed(tmp_path, max_steps)
    assert hits >= kills / 2


@pytest.fixture(scope="module")
def one_big_batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("batch8")
    train(out, {"batch_size": 8, "max_steps": 8, "log_steps": 1})
    return out


def assert_same_run(out: Path, other: Path) -> None:
    for row, other_row in zip(metrics(out), metrics(other), strict=True):
        assert row == pytest.approx(other_row, rel=1e-6, abs=1e-6)
    ours, theirs = (load_latest(folder / "checkpoints")[1] for folder in (out, other))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_two_micro_batches_of_four_are_one_batch_of_eight(tmp_path: Path, one_big_batch: Path):
    train(tmp_path, {"batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 8, "log_steps": 1})
    assert_same_run(tmp_path, one_big_batch)


def test_two_processes_of_two_micro_batches_of_two_are_one_batch_of_eight(
    tmp_path: Path, one_big_batch: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(distributed, "_BUCKET", 100)  # elements: it holds some of a role's tensors and not others

    def work(_rank: int) -> None:
        train(tmp_path, {"batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 8, "log_steps": 1})

    well(2, work, tmp_path / "said")
    assert_same_run(tmp_path, one_big_batch)
