"""Shards: complete or absent, checked, and refused in one line when they are not what was written."""

import json
from pathlib import Path

import pytest
import torch

from fewstep.data.durable import write_durably
from fewstep.data.shards import Shards
from fewstep.errors import UserError

ABOUT = {"format": "numbers-1", "num": 10, "shard_size": 4, "seed": 3}


def begin(folder: Path, resume: bool = False, **changes) -> Shards:
    return Shards.begin(folder, {**ABOUT, **changes}, "make numbers", resume=resume)


def tensors(shards: Shards, number: int) -> dict[str, torch.Tensor]:
    rows = torch.tensor(list(shards.rows(number)))
    return {"row": rows, "x": rows[:, None].bfloat16() * torch.ones(2, dtype=torch.bfloat16)}


def whole(folder: Path) -> Shards:
    shards = begin(folder)
    for number in shards.numbers:
        shards.write(number, tensors(shards, number))
    return shards


def find(folder: Path) -> Shards:
    return Shards.find(folder, "numbers-1", "make numbers")


def test_rows_are_read_one_by_one(tmp_path: Path):
    whole(tmp_path)
    found = find(tmp_path)
    assert [len(found.rows(number)) for number in found.numbers] == [4, 4, 2]
    for index in (0, 3, 4, 9):
        row = found.row(index)
        assert int(row["row"]) == index
        assert row["x"].tolist() == [index, index] and row["x"].dtype == torch.bfloat16


def test_equal_shards_are_equal_files(tmp_path: Path):
    one, two = whole(tmp_path / "one"), whole(tmp_path / "two")
    for number in one.numbers:
        assert one.path(number).read_bytes() == two.path(number).read_bytes()


def test_a_missing_shard_is_named(tmp_path: Path):
    whole(tmp_path).path(1).unlink()
    with pytest.raises(UserError, match=r"not complete: shard_000001.safetensors is missing; run make numbers"):
        find(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_shard_is_refused_and_written_again(tmp_path: Path, size: int):
    shards = whole(tmp_path)
    content = shards.path(1).read_bytes()
    shards.path(1).write_bytes(content[:size])
    with pytest.raises(UserError, match=r"shard_000001.safetensors is truncated or damaged; .*--resume") as error:
        find(tmp_path)
    assert "\n" not in str(error.value)
    again = begin(tmp_path, resume=True)
    assert [number for number in again.numbers if not again.is_whole(number)] == [1]


def test_a_changed_number_or_another_folders_shard_is_seen(tmp_path: Path):
    shards = whole(tmp_path / "one")
    content = bytearray(shards.path(0).read_bytes())
    content[-1] ^= 1
    shards.path(0).write_bytes(content)
    assert not shards.is_whole(0)
    other = begin(tmp_path / "two", seed=4)
    other.write(0, tensors(other, 0))
    shards.path(0).write_bytes(other.path(0).read_bytes())
    assert not shards.is_whole(0)


def test_a_folder_is_begun_once_and_gone_on_with_only_for_the_same(tmp_path: Path):
    begin(tmp_path / "shards")
    with pytest.raises(UserError, match="begun already; add --resume"):
        begin(tmp_path / "shards")
    begin(tmp_path / "shards", resume=True)
    with pytest.raises(UserError, match="begun with another seed"):
        begin(tmp_path / "shards", resume=True, seed=4)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds nothing of make numbers"):
        begin(tmp_path / "other")


def test_what_is_no_such_folder_is_refused(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds nothing of make numbers; make it with"):
            find(folder)
    whole(tmp_path / "one")
    with pytest.raises(UserError, match="'numbers-1', not 'letters-1'"):
        Shards.find(tmp_path / "one", "letters-1", "make letters")
    about = tmp_path / "one" / "about.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "num": 3}))
    with pytest.raises(UserError, match="not what was written"):
        find(tmp_path / "one")
    about.write_text("[")
    with pytest.raises(UserError, match="cannot be read"):
        find(tmp_path / "one")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_durably(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"
