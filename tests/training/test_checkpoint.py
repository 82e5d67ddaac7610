"""Checkpoints are whole or refused in one line; only the newest are kept."""

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch

from fewstep.errors import UserError
from fewstep.training import checkpoint
from tests.checkpoints import load_latest


def write(folder: Path, *steps: int, keep: int = 3) -> None:
    for step in steps:
        tensors = {"student": {"w": torch.full((3,), float(step))}, "student_optimizer": {}}
        checkpoint.save(folder, step, tensors, {"method": "tiny"}, keep)


def test_what_was_saved_is_loaded_and_the_newest_wins(tmp_path: Path):
    write(tmp_path, 2, 10)
    state, tensors = load_latest(tmp_path)
    assert (state["step"], state["method"]) == (10, "tiny")
    assert torch.equal(tensors["student"]["w"], torch.full((3,), 10.0))
    assert tensors["student_optimizer"] == {}


def test_tensors_that_share_memory_or_are_views_are_saved_as_they_look(tmp_path: Path):
    base = torch.arange(6.0).reshape(2, 3)
    checkpoint.save(tmp_path, 0, {"role": {"a": base, "b": base.T, "c": base[0]}}, {}, 1)
    loaded = load_latest(tmp_path)[1]["role"]
    assert torch.equal(loaded["b"], base.T)
    assert torch.equal(loaded["c"], base[0])


def test_only_the_newest_are_kept(tmp_path: Path):
    write(tmp_path, 1, 2, 3, 4, keep=2)
    assert checkpoint.steps_in(tmp_path) == [3, 4]


def test_a_half_written_checkpoint_is_not_seen_and_is_replaced(tmp_path: Path):
    write(tmp_path, 1)
    (tmp_path / ".partial_00000002").mkdir()
    (tmp_path / ".partial_00000002" / "student.safetensors").write_bytes(b"half")
    assert checkpoint.steps_in(tmp_path) == [1]
    write(tmp_path, 2)
    assert load_latest(tmp_path)[0]["step"] == 2
    assert not list(tmp_path.glob(".partial*"))


def test_folders_of_other_names_are_left_alone(tmp_path: Path):
    write(tmp_path, 1)
    (tmp_path / "step_00000009_damaged").mkdir()
    assert checkpoint.steps_in(tmp_path) == [1]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = [truncate, alter, empty, Path.unlink]
FILES = ["student.safetensors", "student_optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over_in_one_line_and_left_where_it_is(tmp_path: Path, name: str, damage):
    write(tmp_path, 4, 5)
    damage(tmp_path / "step_00000005" / name)
    before = contents(tmp_path)
    found = checkpoint.find_latest(tmp_path)
    assert (found.state["step"], found.folder) == (4, tmp_path / "step_00000004")
    assert torch.equal(found.tensors()["student"]["w"], torch.full((3,), 4.0))
    assert re.search(rf"step 5: {re.escape(name)} .*going on from step 4", found.note)
    assert "\n" not in found.note
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_where_none_is_whole_one_line_says_what_each_lacks(tmp_path: Path, name: str, damage):
    write(tmp_path, 4, 5)
    truncate(tmp_path / "step_00000004" / "state.json")
    damage(tmp_path / "step_00000005" / name)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"step 5: {re.escape(name)} .*; step 4: state\.json cannot") as caught:
        load_latest(tmp_path)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("key", "value"), [("step", 4), ("method", "other"), ("files", {}), ("files", []), ("surprise", 1)]
)
def test_a_state_that_was_edited_is_refused(tmp_path: Path, key: str, value: object):
    write(tmp_path, 5)
    path = tmp_path / "step_00000005" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=r"state\.json"):
        load_latest(tmp_path)


def test_a_checkpoint_under_another_name_is_not_taken_for_that_step(tmp_path: Path):
    write(tmp_path, 5)
    shutil.copytree(tmp_path / "step_00000005", tmp_path / "step_00000009")
    assert checkpoint.find_latest(tmp_path).folder.name == "step_00000005"


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path: Path):
    write(tmp_path, 4, 5)
    alter(tmp_path / "step_00000005" / "student.safetensors")
    write(tmp_path, 5)
    assert checkpoint.find_latest(tmp_path).note == ""
    assert load_latest(tmp_path)[0]["step"] == 5


@pytest.mark.parametrize("keep", [1, 2])
def test_the_limit_never_counts_damaged_ones_in_the_place_of_whole_ones(tmp_path: Path, keep: int):
    write(tmp_path, 10, 20, 27, 30, keep=9)
    truncate(tmp_path / "step_00000027" / "student.safetensors")
    alter(tmp_path / "step_00000030" / "student.safetensors")  # of its size it is whole
    write(tmp_path, 28, keep=keep)
    # The one that is newer than what was gone on from stays until its step comes, or the run has passed it.
    assert checkpoint.steps_in(tmp_path) == {1: [28, 30], 2: [20, 27, 28, 30]}[keep]
    assert checkpoint.find_latest(tmp_path).state["step"] == 28
    write(tmp_path, 31, 32, keep=keep)
    assert checkpoint.steps_in(tmp_path) == [31, 32][-keep:]


@pytest.mark.parametrize("content", ["[]", "3", "null"])
def test_a_state_that_is_no_object_is_refused(tmp_path: Path, content: str):
    write(tmp_path, 5)
    (tmp_path / "step_00000005" / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state\.json"):
        load_latest(tmp_path)


@pytest.mark.parametrize("left", [".partial_00000007", ".removed_step_00000007"])
def test_what_a_kill_left_is_never_seen_and_goes_with_the_next_one(tmp_path: Path, left: str):
    write(tmp_path, 1, 7)
    (tmp_path / "step_00000007").rename(tmp_path / left)
    assert checkpoint.find_latest(tmp_path).state["step"] == 1
    write(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_the_checkpoint_before_a_removed_one_can_be_loaded(tmp_path: Path):
    write(tmp_path, 4, 5)
    for path in (tmp_path / "step_00000005").iterdir():
        path.unlink()
    (tmp_path / "step_00000005").rmdir()
    assert load_latest(tmp_path)[0]["step"] == 4


def test_no_checkpoint_is_said_so(tmp_path: Path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_latest(tmp_path / "nowhere")


def test_a_full_disk_is_one_line_and_keeps_the_older_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"student": {"w": torch.zeros(10)}}, {}, keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # no file may grow beyond, as on a full disk
    try:
        with pytest.raises(UserError, match=r"step 2 could not be written .*--resume from step 1"):
            checkpoint.save(tmp_path, 2, {"student": {"w": torch.zeros(10_000)}}, {}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
