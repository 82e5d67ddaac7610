"""The table of all methods: ratios, marks and medians by hand, and what the repository holds of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from fewstep.errors import UserError
from fewstep.eval.benchmark.cell_results import RESULTS, read_result, strip_path, why_stale, write_result
from fewstep.eval.benchmark.cells import Cell, Training, read_plan
from fewstep.eval.benchmark.comparison import compare, insert
from fewstep.eval.methods import page_table, publish, seeds_kept
from tests.eval.test_cells import cell, result

ROOT = Path(__file__).resolve().parent.parent.parent
SHARED = Training("shared", "sid", "fashion-flow", 4, at=(1, 4), gated=False)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Teachers at 1, 4 and 25 steps, a student of three seeds, one of two step counts that claims nothing."""
    teachers = {("fashion-sd", 1): 8.0, ("fashion-sd", 4): 1.2, ("fashion-sd", 25): 0.7}
    teachers |= {("fashion-flow", steps): fd for steps, fd in ((1, 6.0), (4, 1.0), (25, 0.8))}
    for (name, steps), fd in teachers.items():
        of = Cell(name, steps, 20)
        write_result(tmp_path, of, result(of, fd, nfe=2 * steps), torch.zeros(10, 1, 32, 32, dtype=torch.uint8))
    for seed, fd in enumerate((0.6, 0.9, 0.75)):
        write_result(tmp_path, cell(seed=seed), result(cell(seed=seed), fd), None)
    for steps, fd in ((1, 5.0), (4, 2.0)):
        of = Cell("fashion-flow", steps, 20, SHARED)
        write_result(tmp_path, of, result(of, fd, nfe=steps), None)
    return tmp_path


def listed() -> list[Cell]:
    cells = [Cell(name, steps, 20) for name in ("fashion-sd", "fashion-flow") for steps in (1, 4, 25)]
    cells += [cell(seed=seed) for seed in (0, 1, 2, 3)]
    return cells + [Cell("fashion-flow", steps, 20, SHARED) for steps in (1, 4)]


def test_the_table_by_hand(results: Path) -> None:
    table = compare(listed(), results).markdown().splitlines()
    rows = [line for line in table if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert "| teacher | `fashion-sd` | 1 | 2 | 8.000 |  | 11.43 | 0.900 | 0.500 |  |  |  |  |" in rows
    cost = "7 k | 110 AVX2 |"
    student = "| `dmd2` | `fashion-sd` | 4 | 4 | 0.750 (0.600 to 0.900) | 1.6x | 1.07 | 0.900 | 0.500 | 3 | 2 | "
    assert student + cost in rows
    assert (
        "| (`shared`) | `fashion-flow` | 1 | 1 | 5.000 | 1.2x | 6.25 | 0.900 | 0.500 | 1 | 200 | 7 k | 110 AVX2 |"
        in rows
    )
    text = "\n".join(table)
    assert "`dmd2` on `fashion-sd`, has 1.07 times the FD of its teacher at 25: within the 1.1" in text
    assert "`shared` on" not in text
    assert "20 samples in every row" in text


def test_what_falls_short_is_marked(results: Path) -> None:
    for seed in (0, 1, 2):
        write_result(results, cell(seed=seed), result(cell(seed=seed), 1.25), None)
    text = compare(listed(), results).markdown()
    assert "| 1.250 (1.250 to 1.250) | 1.0x † |" in text
    assert "has 1.79 times the FD of its teacher at 25: not within the 1.1" in text


def test_who_fills_holes_has_a_table_with_what_is_kept(results: Path) -> None:
    shown, cells = Training("dmd2", "dmd2", "fashion-inpaint", 1, settings={"data": "targets"}), []
    for training, steps, fd, keeps in ((None, 1, 3.0, 0.92), (None, 25, 0.5, 0.95), (shown, 1, 0.75, 0.931)):
        cells.append(Cell("fashion-inpaint", steps, 20, training))
        of = result(cells[-1], fd)
        write_result(results, cells[-1], replace(of, metrics={**of.metrics, "kept": keeps}), None)
    tables = compare([*listed(), *cells], results).markdown().split("\n\n")
    assert "kept" not in tables[0] and "fashion-inpaint" not in tables[0]
    assert (
        "| agreement | kept | recall |" in tables[1] and len({line.count("|") for line in tables[1].split("\n")}) == 1
    )
    assert "| teacher | `fashion-inpaint` | 1 | 4 | 3.000 |  | 6.00 | 0.900 | 0.920 | 0.500 |" in tables[1]
    assert "| `dmd2` | `fashion-inpaint` | 1 | 4 | 0.750 | 4.0x | 1.50 | 0.900 | 0.931 | 0.500 |" in tables[1]
    assert "`dmd2` on `fashion-inpaint`, has 1.50 times the FD of its teacher at 25: within the 1.6 that" in tables[3]
    less = result(cells[-1], 0.9)
    write_result(results, cells[-1], replace(less, metrics={**less.metrics, "kept": 0.929}), None)
    text = compare([*listed(), *cells], results).markdown()
    assert "| 0.900 | 0.929 † |" in text and "has 1.80 times the FD of its teacher at 25: not within the 1.6" in text


def test_the_picture_shows_what_is_given_to_who_fills_holes(results: Path) -> None:
    before = compare(listed(), results).picture(results).height
    cells = [Cell("fashion-inpaint", steps, 20) for steps in (4, 25)]
    for one in cells:
        write_result(results, one, result(one), torch.zeros(10, 3, 32, 32, dtype=torch.uint8))
    drawn = compare([*listed(), *cells], results).picture(results)
    assert drawn.height == before + 3 * 36
    rows = torch.from_numpy(numpy.array(drawn))[before - 8 :]
    assert (rows[:36] == 128).sum() > 10 * 0.39 * 32 * 32 and (rows[36:] == 128).sum() < 50


def test_unlike_numbers_of_samples_are_not_compared(results: Path) -> None:
    more = cell(num=30)
    write_result(results, more, result(more), None)
    with pytest.raises(UserError, match="unlike numbers of samples"):
        compare([*listed()[:6], more], results)


def test_stale_and_missing_cells_have_no_row(results: Path) -> None:
    changed = Training("dmd2", "dmd2", "fashion-sd", 4, settings={"gan_weight": 0.0, "max_steps": 3})
    rows = compare([*listed()[:6], cell(training=changed)], results).rows
    assert {row.name for row in rows} == {"teacher"}
    with pytest.raises(UserError, match="no result of a present recipe"):
        compare([cell(training=changed)], results)


def test_without_its_teachers_rows_a_student_has_no_ratios(results: Path) -> None:
    text = compare([Cell("fashion-flow", 25, 20), cell()], results).markdown()
    assert "| `dmd2` | `fashion-sd` | 4 | 4 | 0.600 |  |  | 0.900 |" in text
    assert "The best student" not in text
    text = compare([Cell("fashion-sd", 4, 20), cell()], results).markdown()  # not at the steps it is called with
    assert "| `dmd2` | `fashion-sd` | 4 | 4 | 0.600 | 2.0x |  | 0.900 |" in text and "The best student" not in text


def test_the_picture_has_a_row_for_each_strip(results: Path) -> None:
    comparison = compare(listed(), results)
    before = comparison.picture(results).height
    write_result(results, cell(), result(cell()), torch.full((10, 1, 32, 32), 9, dtype=torch.uint8))
    assert comparison.picture(results).height == before + 36
    for path in results.glob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match="no samples"):
        comparison.picture(results)


def test_the_table_goes_into_its_place_only() -> None:
    document = "a\n<!-- methods: make methods writes from here -->\nold\n<!-- methods: to here -->\nb\n"
    once = insert(document, "new")
    assert "old" not in once and once.startswith("a\n") and once.endswith("\nb\n")
    assert insert(once, "new") == once
    with pytest.raises(UserError, match="no place for the table"):
        insert("nothing", "new")


# --- what the repository holds ----------------------------------------------------------------------------------


def kept() -> list[Cell]:
    plan = read_plan()
    return [
        one for one in plan.cells(seeds_kept(plan, ROOT / RESULTS)) if (ROOT / RESULTS / f"{one.file}.json").exists()
    ]


def test_every_committed_result_is_of_the_present_recipe() -> None:
    """A recipe, an override, the teacher or the judge was changed: the cells that depend on it are run again."""
    stale = [why for one in kept() if (why := why_stale(one, read_result(ROOT / RESULTS, one)))]
    if stale:
        pytest.fail("\n".join(stale), pytrace=False)


def test_every_committed_file_belongs_to_a_listed_cell() -> None:
    listed = {f"{one.file}.json" for one in kept()} | {strip_path(ROOT / RESULTS, one).name for one in kept()}
    assert {path.name for path in (ROOT / RESULTS).iterdir()} - listed <= {"methods.png"}
    assert sum(path.stat().st_size for path in (ROOT / RESULTS).iterdir()) < 2 * 2**20


def test_the_page_of_methods_shows_the_table_that_the_results_make() -> None:
    table = page_table(compare(kept(), ROOT / RESULTS))
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    if insert(page, table) != page:
        pytest.fail("run python -m fewstep.eval.methods --table --readme docs/methods.md", pytrace=False)


def test_publish_writes_picture_and_document(results: Path, tmp_path: Path) -> None:
    plan = read_plan()
    for one in plan.cells(num=20)[: 2 * len(plan.teacher_steps)]:
        write_result(results, one, result(one), torch.zeros(10, 1, 32, 32, dtype=torch.uint8))
    page = tmp_path / "methods.md"
    page.write_text("<!-- methods: make methods writes from here --><!-- methods: to here -->")
    table = publish(plan, results, page, num=20)
    assert table in page.read_text()
    assert (results / "methods.png").read_bytes()[:4] == b"\x89PNG"
