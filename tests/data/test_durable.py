"""What a refusal leaves on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.data.durable import nothing_left
from fewstep.errors import UserError


@pytest.mark.parametrize("there", [(), ("a",), ("a", "a/b")])
def test_a_refusal_takes_the_empty_folders_with_it_that_it_made(tmp_path: Path, there: tuple[str, ...]) -> None:
    for name in there:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError), nothing_left(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b").mkdir(parents=True, exist_ok=True)
        raise UserError("no")
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {*there}


def test_what_holds_something_stays_and_so_does_what_another_error_leaves(tmp_path: Path) -> None:
    with pytest.raises(UserError), nothing_left(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "kept").touch()
        raise UserError("no")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]
    with pytest.raises(KeyError), nothing_left(tmp_path / "c"):
        (tmp_path / "c").mkdir()
        raise KeyError
    assert (tmp_path / "c").is_dir()
