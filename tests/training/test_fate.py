"""Where a process of a launch dies or fails, the others end too, and one line says why."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import Ended, forked

from fewstep import cli
from fewstep.cli import distill
from fewstep.errors import UserError
from fewstep.training import fate
from fewstep.training.distributed import join_launch, leave_launch
from fewstep.training.fate import shared_fate

SOON = 20.0  # seconds; without the shared fate, those who wait in a collective wait for hours


@pytest.fixture(autouse=True)
def _news_come_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fate, "_NEWS", 4.0)


def launch(folder: Path, rank: int, end: str, waiting: str = "collective") -> list[Ended]:
    """Three processes, of which one comes to its end while the others wait for it."""

    def run(_words: list[str]) -> None:
        accelerator = join_launch(cpu=True)
        with shared_fate(accelerator):
            dist.all_reduce(torch.ones(2))
            if accelerator.process_index == rank or end.startswith("same"):
                if end == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if end in ("mistake", "same mistake"):
                    raise UserError("the disk is full")
                if end in ("bug", "same bug"):
                    raise RuntimeError("a bug")
            if waiting == "work" and accelerator.is_main_process:
                signal.pause()  # it writes a student, and the others wait for that
            accelerator.wait_for_everyone()
        leave_launch()

    def process(_rank: int) -> int:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # in the loop it asks for a checkpoint, and ends nobody
        distill.run = run
        return cli.main(["distill"])

    return forked(3, process, folder)


def lines(ended: list[Ended]) -> list[str]:
    """What people read of it."""
    return [line for end in ended for line in end.said.splitlines() if line.startswith("fewstep: ")]


def test_processes_that_end_well_say_nothing(tmp_path: Path) -> None:
    ended = launch(tmp_path, 0, "well")
    assert [end.code for end in ended] == [0, 0, 0] and lines(ended) == []


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("waiting", ["collective", "work"])
def test_a_killed_process_takes_the_others_down_in_one_line(tmp_path: Path, rank: int, waiting: str) -> None:
    ended = launch(tmp_path, rank, "kill", waiting)
    assert [end.code for end in ended] == [-signal.SIGKILL if one == rank else 1 for one in range(3)]
    (line,) = lines(ended)
    assert f"process {rank} died" in line and "--resume" in line
    assert max(end.seconds for end in ended) < SOON


@pytest.mark.parametrize(
    ("rank", "line"), [(0, "fewstep: the disk is full"), (1, "fewstep: process 1: the disk is full")]
)
def test_a_mistake_on_one_process_ends_all_in_its_line(tmp_path: Path, rank: int, line: str) -> None:
    ended = launch(tmp_path, rank, "mistake")
    assert [end.code for end in ended] == [2, 2, 2] and lines(ended) == [line]
    assert "Traceback" not in "".join(end.said for end in ended)
    assert max(end.seconds for end in ended) < SOON


def test_a_mistake_that_all_processes_find_is_said_once(tmp_path: Path) -> None:
    ended = launch(tmp_path, 0, "same mistake")
    assert [end.code for end in ended] == [2, 2, 2] and lines(ended) == ["fewstep: the disk is full"]


@pytest.mark.parametrize(("rank", "end"), [(0, "bug"), (1, "bug"), (0, "same bug")])
def test_a_bug_shows_its_traceback_once(tmp_path: Path, rank: int, end: str) -> None:
    ended = launch(tmp_path, rank, end)
    said = "".join(one.said for one in ended)
    assert [one.code for one in ended] == [1, 1, 1]
    assert said.count("Traceback") == 1 and said.count("RuntimeError: a bug") == 1
    assert lines(ended) == (["fewstep: process 1: a bug"] if (rank, end) == (1, "bug") else [])
    assert max(one.seconds for one in ended) < SOON
