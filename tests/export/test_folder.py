"""A student's folder is whole or absent, whatever happens while it is written, and an older one is never lost."""

import os
from pathlib import Path

import pytest

from fewstep.export.about import FILE
from fewstep.export.folder import remove_student, written
from tests.faults import Faults, every_fault


def write(out: Path, words: str) -> None:
    with written(out) as partial:
        (partial / "unet").mkdir()
        (partial / "unet" / "config.json").write_text(words)
        (partial / FILE).write_text(words)


def contents(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}


def student(words: str) -> dict[str, str]:
    return {f"student/{name}": words for name in (FILE, "unet/config.json")}


@pytest.mark.parametrize("kind", ["death", "power", "full"])
def test_at_every_moment_there_is_one_student_and_it_is_whole(kind: str):
    whole = {FILE, "unet/config.json"}

    def check(root: Path, fault: Faults) -> None:
        there = contents(root / "student")
        # Between the two renames there is none, and the next call puts the older one back.
        seen = contents(root / ".student.old") if not there and kind != "full" else there
        assert seen.keys() == whole and set(seen.values()) in ({"old"}, {"new"}), fault.happened
        with pytest.raises(KeyboardInterrupt), written(root / "student"):
            raise KeyboardInterrupt
        assert contents(root / "student").keys() == whole, fault.happened
        write(root / "student", "new")
        assert contents(root) == {f"student/{name}": "new" for name in whole}, fault.happened

    every_fault(
        kind, lambda root: write(root / "student", "new"), check, 8, lambda root: write(root / "student", "old")
    )


def test_a_signal_between_the_renames_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "student", "old")
    calls, rename = [], os.rename

    def interrupted(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(*paths)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "student", "new")
    assert contents(tmp_path) == {f"student/{name}": "old" for name in (FILE, "unet/config.json")}


def test_a_form_that_a_run_has_no_longer_goes_as_a_whole():
    def check(root: Path, fault: Faults) -> None:
        assert contents(root / "student").keys() in ({FILE, "unet/config.json"}, set()), fault.happened
        remove_student(root / "student")
        assert contents(root) == {}, fault.happened

    every_fault(
        "death", lambda root: remove_student(root / "student"), check, 4, lambda root: write(root / "student", "old")
    )
