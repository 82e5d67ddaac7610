"""Checkpoints are whole or refused in one line; only the newest are kept."""

import json
import resource
from pathlib import Path

import pytest
import torch

from fewstep.errors import UserError
from fewstep.training import checkpoint


def write(folder: Path, *steps: int, keep: int = 3) -> None:
    for step in steps:
        tensors = {"student": {"w": torch.full((3,), float(step))}, "student_optimizer": {}}
        checkpoint.save(folder, step, tensors, {"method": "tiny"}, keep)


def test_what_was_saved_is_loaded_and_the_newest_wins(tmp_path: Path):
    write(tmp_path, 2, 10)
    state, tensors = checkpoint.load_latest(tmp_path)
    assert (state["step"], state["method"]) == (10, "tiny")
    assert torch.equal(tensors["student"]["w"], torch.full((3,), 10.0))
    assert tensors["student_optimizer"] == {}


def test_tensors_that_share_memory_or_are_views_are_saved_as_they_look(tmp_path: Path):
    base = torch.arange(6.0).reshape(2, 3)
    checkpoint.save(tmp_path, 0, {"role": {"a": base, "b": base.T, "c": base[0]}}, {}, 1)
    loaded = checkpoint.load_latest(tmp_path)[1]["role"]
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
    assert checkpoint.load_latest(tmp_path)[0]["step"] == 2
    assert not list(tmp_path.glob(".partial*"))


def test_folders_of_other_names_are_left_alone(tmp_path: Path):
    write(tmp_path, 1)
    (tmp_path / "step_00000009_damaged").mkdir()
    assert checkpoint.steps_in(tmp_path) == [1]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["student.safetensors", "student_optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [truncate, alter, empty, Path.unlink])
def test_damage_is_refused_in_one_line_that_names_the_folder(tmp_path: Path, name: str, damage):
    write(tmp_path, 5)
    damage(tmp_path / "step_00000005" / name)
    with pytest.raises(UserError, match="step_00000005 is damaged") as caught:
        checkpoint.load_latest(tmp_path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert "remove that folder" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("step", 4), ("method", "other"), ("files", {}), ("files", []), ("surprise", 1)]
)
def test_a_state_that_was_edited_is_refused(tmp_path: Path, key: str, value: object):
    write(tmp_path, 5)
    path = tmp_path / "step_00000005" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=r"state\.json"):
        checkpoint.load_latest(tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", "null"])
def test_a_state_that_is_no_object_is_refused(tmp_path: Path, content: str):
    write(tmp_path, 5)
    (tmp_path / "step_00000005" / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state\.json"):
        checkpoint.load_latest(tmp_path)


def test_the_checkpoint_before_a_removed_one_can_be_loaded(tmp_path: Path):
    write(tmp_path, 4, 5)
    for path in (tmp_path / "step_00000005").iterdir():
        path.unlink()
    (tmp_path / "step_00000005").rmdir()
    assert checkpoint.load_latest(tmp_path)[0]["step"] == 4


def test_no_checkpoint_is_said_so(tmp_path: Path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.load_latest(tmp_path / "nowhere")


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
