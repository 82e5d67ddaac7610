"""A process among those of its launch: accelerate may have been asked for several, and started one."""

import os
import sys

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from fewstep.errors import UserError
from fewstep.training.distributed import join_launch


@pytest.fixture(autouse=True)
def not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def launched(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """The environment that ``accelerate launch`` gives the one process that it starts on a machine without GPUs."""
    words = [*flags, "-m", "fewstep.trainers.dmd2", "--teacher", "my teacher"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    command, environment = prepare_simple_launcher_cmd_env(arguments)
    for name in environment.keys() - os.environ.keys():
        monkeypatch.setenv(name, environment[name])
    monkeypatch.setattr(sys, "orig_argv", command)


@pytest.mark.parametrize("flags", [["--cpu", "--num_processes", "2"], ["--num_processes", "8"]], ids=" ".join)
def test_a_lone_process_of_several_is_refused_with_the_line_that_starts_them(
    monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    launched(monkeypatch, *flags)
    line = "start torchrun --nproc_per_node N -m -- fewstep.trainers.dmd2 --teacher 'my teacher';"
    with pytest.raises(UserError, match=line):
        join_launch(cpu=True)


@pytest.mark.parametrize(
    "flags", [[], ["--cpu"], ["--num_processes", "1"], ["--cpu", "--num_processes", "1"]], ids=" ".join
)
def test_one_process_that_was_meant_is_not_refused(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    launched(monkeypatch, *flags)
    assert "ACCELERATE_MIXED_PRECISION" in os.environ
    assert join_launch(cpu=True).num_processes == 1


def test_a_port_of_the_users_own_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert join_launch(cpu=True).num_processes == 1
