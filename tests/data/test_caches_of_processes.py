"""A cache, and pairs, that several processes of a launch make: the files of one process, also after kills."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewstep.cli import main
from fewstep.data.condition_cache import CacheWriter
from fewstep.data.shards import Shards
from tests.forked import Ended, forked, well
from tests.tiny_pipelines import tiny_stable_diffusion

COMMANDS = {
    "cache": ["cache", "--shard_size", "1"],
    "pairs": ["pairs", "--num", "7", "--teacher_steps", "1", "--batch_size", "1", "--shard_size", "1"],
}
every_command = pytest.mark.parametrize("command", ["cache", pytest.param("pairs", marks=pytest.mark.soak)])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags that say what is made."""
    place = tmp_path_factory.mktemp("inputs")
    tiny_stable_diffusion().save_pretrained(place / "teacher")
    prompts = ["a cat", "the end", "a dog", "x", "a red car", "the other end", "y"]
    (place / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    return ["--teacher", str(place / "teacher"), "--prompts", str(place / "prompts.txt"), "--cpu"]


@pytest.fixture(scope="module")
def alone(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """The files that one process makes, by command."""

    @functools.cache
    def made(command: str) -> dict[str, bytes]:
        place = tmp_path_factory.mktemp("alone") / command
        assert main([*COMMANDS[command], *inputs, "--out", str(place)]) == 0
        return files(place)

    return made


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".partial"}


def at_second_shard(rank: int, act: Callable[[], Any]) -> None:
    """Let process 1 do something in the middle of its second shard."""
    written: list[int] = []
    for kind in (CacheWriter, Shards):

        def write(self: Any, *given: Any, write: Any = kind.write) -> Any:
            if rank == 1 and written:
                act()
            written.append(given[0])
            return write(self, *given)

        kind.write = write


@every_command
def test_two_processes_make_the_files_of_one(
    tmp_path: Path, inputs: list[str], alone: Callable[[str], dict[str, bytes]], command: str
) -> None:
    words = [*COMMANDS[command], *inputs, "--out", str(tmp_path / "out")]
    well(2, lambda _rank: main(words), tmp_path / "said")
    assert files(tmp_path / "out") == alone(command)
    said = "".join((tmp_path / "said" / f"stderr_{rank}.txt").read_text() for rank in range(2))
    assert said.count(f"is in {tmp_path / 'out'}") + said.count(f"are in {tmp_path / 'out'}") == 1


@every_command
@pytest.mark.parametrize("then", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_a_kill_loses_no_whole_shard(
    tmp_path: Path, inputs: list[str], alone: Callable[[str], dict[str, bytes]], command: str, then: int
) -> None:
    words = [*COMMANDS[command], *inputs, "--out", str(tmp_path / "out")]

    def killed(rank: int) -> int:
        at_second_shard(rank, lambda: os.kill(os.getpid(), signal.SIGKILL))
        return main(words)

    ended = forked(2, killed, tmp_path / "killed")
    assert [end.code for end in ended] == [1, -signal.SIGKILL] and lines(ended) == ["fewstep: process 1 died"]
    kept = files(tmp_path / "out")
    assert len(kept) >= 2 and kept != alone(command)
    well(then, lambda _rank: main([*words, "--resume"]), tmp_path / "said")
    assert files(tmp_path / "out") == alone(command)


@pytest.mark.soak
@pytest.mark.parametrize("command", list(COMMANDS))
def test_an_error_of_one_process_ends_all_in_one_line(tmp_path: Path, inputs: list[str], command: str) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    def failing(rank: int) -> int:
        at_second_shard(rank, full)
        return main([*COMMANDS[command], *inputs, "--out", str(tmp_path / "out")])

    ended = forked(2, failing, tmp_path / "said")
    assert [end.code for end in ended] == [2, 2]
    assert lines(ended) == ["fewstep: process 1: [Errno 28] No space left on device"]


@pytest.mark.soak
@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_mistake_is_said_once(tmp_path: Path, inputs: list[str], command: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    words = [*COMMANDS[command], *inputs, "--out", str(tmp_path / "out")]
    ended = forked(2, lambda _rank: main(words), tmp_path / "said")
    assert [end.code for end in ended] == [2, 2]
    (line,) = lines(ended)
    assert "not empty" in line


def lines(ended: list[Ended]) -> list[str]:
    """What people read of it, but for the advice."""
    said = [line for end in ended for line in end.said.splitlines() if line.startswith("fewstep: ")]
    return [line.partition(";")[0] if "died" in line else line for line in said]
