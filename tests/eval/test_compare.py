"""Joined reports: what may share a column does, what may not says why; and folders that cannot be joined."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_reports import CONDITIONS, MEASURES, ROWS, row, toy_report, with_pictures

from fewstep.cli import main
from fewstep.errors import UserError
from fewstep.eval.compare import compare, distinct
from fewstep.eval.report import Report, protocol

TEACHERS, STUDENTS = ROWS[:2], ROWS[2:]


def rows(*given: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [row(role, steps, numbers) for role, steps, *numbers in given]


def better(**changes: Any) -> Report:
    """A report of the same teacher and of a student whose FID is lower by one."""
    students = [(role, steps, fid - 1, *rest) for role, steps, fid, *rest in STUDENTS]
    return toy_report(**{"rows": rows(*TEACHERS, *students), **changes})


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Saves a report as RUN/report."""

    def save(run: str, report: Report, *, pictures: bool = True) -> Path:
        out = tmp_path / run / "report"
        out.mkdir(parents=True)
        (with_pictures(report, out) if pictures else report).save(out)
        return out

    return save


def test_what_was_measured_alike_shares_its_columns(saved: Callable[..., Path], tmp_path: Path) -> None:
    made = compare([saved("a", toy_report()), saved("b", better())], tmp_path / "both")
    assert list(made.measures) == list(MEASURES) and made.num == 1000 and made.seed == 0
    # The teacher is the same and stands once; students that have one name get the report's.
    assert [(one["model"], one["steps"], one["metrics"]["fid"]) for one in made.rows] == [
        *(("teacher", 4, 31.4), ("teacher", 25, 4.0)),
        *(("a: student", 1, 12.0), ("a: student", 4, 5.0), ("b: student", 1, 11.0), ("b: student", 4, 4.0)),
    ]
    assert made.rows[5]["relative"]["fid_to_teacher"] == 1.0
    assert made.notes == [
        "The teacher of b has the numbers of another report's, and stands there.",
        "a, b: 2 of 1,000 prompts were cut after 77 tokens.",
    ]
    assert Report.load(tmp_path / "both" / "report.json") == made
    # Pictures of the same seeds and prompts are copied, and stand in the page.
    assert made.conditions["shown"] == list(CONDITIONS)
    assert all((tmp_path / "both" / name).is_file() for one in made.rows for name in one["pictures"])
    assert (tmp_path / "both" / "report.html").read_text().count("<img src=") == 18
    text = (tmp_path / "both" / "report.md").read_text()
    assert text.startswith("# Comparison\n") and "grid.png" not in text


def test_milliseconds_keep_their_reports_columns(saved: Callable[..., Path], tmp_path: Path) -> None:
    lines = compare([saved("a", toy_report()), saved("b", better())], tmp_path / "both").table().splitlines()
    for title in ("latency ms (a)", "latency ms (b)", "images/s (a)", "images/s (b)", "x as fast", "x teacher"):
        assert title in lines[0]
    page = html.unescape((tmp_path / "both" / "report.html").read_text())
    assert "latency over that of the own report's teacher" in page and "latency of one sample, ms" not in page


OTHER = MEASURES["fid"]
#: (what of the second report differs, measures that get two columns, what a note says of FID)
APART: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "samples": (
        {"num": 500, "protocol": protocol(num=500, seed=0, conditions_sha256="12" * 32)},
        list(MEASURES),
        "a and b differ in num 1000 and 500",
    ),
    "seed": (
        {"seed": 1, "protocol": protocol(num=1000, seed=1, conditions_sha256="12" * 32)},
        list(MEASURES),
        "a and b differ in seed 0 and 1",
    ),
    "conditions": (
        {"protocol": protocol(num=1000, seed=0, conditions_sha256="34" * 32)},
        list(MEASURES),
        f"a and b differ in conditions_sha256 {'12' * 19}1… and {'34' * 19}3…",
    ),
    "weights": (
        {"measures": MEASURES | {"fid": dataclasses.replace(OTHER, weights_sha256="77" * 32)}},
        ["fid"],
        f"a and b differ in weights_sha256 {'ab' * 19}a… and {'77' * 19}7…",
    ),
    "resize": (
        {"measures": MEASURES | {"fid": dataclasses.replace(OTHER, resize="legacy_tensorflow, 299")}},
        ["fid"],
        "a and b differ in resize clean, 299 and legacy_tensorflow, 299",
    ),
    "reference and its number": (
        {"measures": MEASURES | {"fid": dataclasses.replace(OTHER, reference="COCO", n_ref=5000)}},
        ["fid"],
        "a and b differ in reference the teacher's own samples and COCO, n_ref 1000 and 5000",
    ),
    "floor": (
        {"measures": MEASURES | {"fid": dataclasses.replace(OTHER, floor=3.0)}},
        ["fid"],
        "a and b differ in floor 2.5 and 3.0",
    ),
}


@pytest.mark.parametrize("difference", APART)
def test_what_was_not_measured_alike_is_kept_apart(difference: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    changes, apart, says = APART[difference]
    made = compare([saved("a", toy_report()), saved("b", better(**changes))], tmp_path / "both")
    names = [key for name in MEASURES for key in ((f"{name} (a)", f"{name} (b)") if name in apart else (name,))]
    assert list(made.measures) == names
    assert not any("fid (a)" in one["metrics"] and "fid (b)" in one["metrics"] for one in made.rows)
    assert f"FID was not measured alike and has several columns, which must not be compared: {says}." in made.notes
    student = next(one for one in made.rows if one["model"] == "b: student" and one["steps"] == 4)
    assert student["relative"]["fid (b)_to_teacher"] == 1.0 and student["spread"] == {"fid (b)": 0.25}
    assert "b: student at 4 steps: FID (b) 4.00 ±0.25 (floor" in made.table()
    if len(apart) > 1:
        assert (made.num is None) == (difference == "samples") and (made.seed is None) == (difference == "seed")
        # Neither are pictures of other seeds or prompts put side by side.
        assert (made.conditions["shown"] == []) == (difference != "samples")
    assert Report.load(tmp_path / "both" / "report.json") == made


def test_of_three_reports_two_share(saved: Callable[..., Path], tmp_path: Path) -> None:
    other = MEASURES | {"fid": dataclasses.replace(OTHER, resize="other")}
    folders = [saved("a", toy_report()), saved("b", better(measures=other)), saved("c", better())]
    made = compare(folders, tmp_path / "all")
    assert [name for name in made.measures if name.startswith("fid")] == ["fid (a, c)", "fid (b)"]


def test_pictures_that_are_gone_are_missed(saved: Callable[..., Path], tmp_path: Path) -> None:
    """Of a report that was sent without them, and of one whose link leads elsewhere."""
    one, other = saved("a", toy_report()), saved("b", better())
    (tmp_path / "secret.png").write_bytes((one / "pictures" / "row_00" / "000.png").read_bytes())
    for path in (other / "pictures").rglob("*.png"):
        path.unlink()
        path.symlink_to(tmp_path / "secret.png")
    compare([one, other], tmp_path / "both")
    page = (tmp_path / "both" / "report.html").read_text()
    assert page.count("<img src=") == 12 and page.count(">missing<") == 6 and "6 pictures are missing" in page


def test_names_are_as_short_as_they_can_be() -> None:
    def named(*folders: str) -> list[str]:
        return distinct([Path("/runs", folder) for folder in folders])

    assert named("a/report", "b/report") == ["a", "b"]
    assert named("a", "b") == ["a", "b"]
    assert named("x/a/report", "y/a/report") == ["x/a", "y/a"]
    assert named("a", "a/report") == ["a", "report"]


MISTAKES: dict[str, tuple[Callable[[Path, Path], list[Path]], str]] = {
    "one report": (lambda a, b: [a], "takes two reports or more"),
    "one report twice": (lambda a, b: [a, a / "report.json"], "is given twice"),
    "no folder": (lambda a, b: [a, a.parent / "nowhere"], "nowhere/report.json is no report that can be read"),
    "no report in it": (lambda a, b: [a, a.parent], "report.json is no report that can be read"),
    "its own folder": (lambda a, b: [a, b, Path("OUT")], "would be overwritten"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line(
    mistake: str, saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, says = MISTAKES[mistake]
    folders = given(saved("a", toy_report(), pictures=False), saved("b", better(), pictures=False))
    out = folders[0] if Path("OUT") in folders else tmp_path / "both"
    words = [str(folder) for folder in folders if folder != Path("OUT")]
    before = (tmp_path / "a" / "report" / "report.json").read_text()
    assert main(["compare", *words, "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fewstep: ") and says in line
    assert not (tmp_path / "both").exists() and (tmp_path / "a" / "report" / "report.json").read_text() == before


def test_the_command_prints_the_table(
    saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(saved(run, report, pictures=False)) for run, report in (("a", toy_report()), ("b", better()))]
    assert main(["compare", *folders, "--out", str(tmp_path / "new" / "both")]) == 0
    assert "b: student" in capsys.readouterr().out
    joined = str(tmp_path / "new" / "both")
    with pytest.raises(UserError, match="joins reports already"):
        compare([joined, folders[0]], tmp_path / "more")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into"):
        compare(folders, tmp_path / "file")
    content = json.loads((tmp_path / "new" / "both" / "report.json").read_text())
    assert [one["label"] for one in content["joined"]] == ["a", "b"]
