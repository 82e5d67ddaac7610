"""Bad input of every kind ends in one line and exit code 2, and leaves every file as it was."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fewstep import reading
from fewstep.cli import distill, main
from fewstep.errors import UserError, printable
from tests import bad_files, bad_inputs, bad_items, bad_words
from tests.bad_inputs import Bad

SETTINGS = [*bad_inputs.settings(), *bad_inputs.negative_settings()]
OTHERS = [
    *bad_files.files(),
    *bad_files.data(),
    *bad_words.names(),
    *bad_words.values(),
    *bad_words.students(),
    *bad_files.forged(),
    *bad_items.items(),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    bad_files.make_place(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_parser_for_each_method() -> Iterator[None]:
    """To make one takes longer than to use it, and it is the same each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "distill_parser", functools.cache(distill.distill_parser))
        patch.setattr(reading, "_MOST_NODES", 250)
        yield


def state_of(*roots: Path) -> dict[str, tuple[int, ...]]:
    """Of every file and link: what would change if it were touched."""
    found = {}
    for root in roots:
        for folder, folders, files in os.walk(root):
            for name in [*files, *(name for name in folders if Path(folder, name).is_symlink())]:
                stat = os.lstat(os.path.join(folder, name))
                found[os.path.join(folder, name)] = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_mode)
    return found


def is_refused(bad: Bad, case: Path, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case.mkdir()
    bad.make(case, place)
    before = state_of(case, place)
    capfd.readouterr()
    if bad.call is not None:
        with pytest.raises(UserError) as caught:
            bad.call(case, place)
        lines = [f"fewstep: {printable(str(caught.value))}"]
        assert "\n" not in str(caught.value)
    else:
        words = [word.replace("{case}", str(case)).replace("{place}", str(place)) for word in bad.words]
        assert main(words) == 2
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1, lines
    assert lines[0].startswith("fewstep: ") and len(lines[0]) > 20
    assert re.search(bad.says.replace("{case}", str(case)), lines[0]), lines[0]
    assert len(lines[0]) < 1500
    assert state_of(case, place) == before


@pytest.mark.parametrize("bad", [*SETTINGS, *OTHERS], ids=lambda bad: re.sub(r"[^ -~]|\W+$", "?", bad.name)[:80])
def test_bad_input(
    bad: Bad, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    is_refused(bad, tmp_path / "case", place, capfd)


def test_there_are_enough_of_them() -> None:
    assert len(SETTINGS) + len(OTHERS) > 300
