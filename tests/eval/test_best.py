"""What auto chooses from is made of the committed results: which rows are in it, and that it is up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.eval.benchmark.best import SHIPPED, choices_table, evidence_of
from fewstep.eval.benchmark.cell_results import RESULTS, write_result
from fewstep.eval.benchmark.cells import Cell, Training, read_plan
from fewstep.eval.benchmark.comparison import compare
from fewstep.eval.methods import seeds_kept
from fewstep.programs.auto import decide
from fewstep.programs.choice import Evidence
from tests.eval.test_cells import result

ROOT = Path(__file__).resolve().parent.parent.parent
FLOW = {"teacher": "fashion-flow", "steps": 4}
GAN = {"data": "fashion", "gan_weight": 0.03}


def rows(folder: Path, *rows: tuple[Training, int, list[float]]) -> Evidence:
    """Results of the flow teacher at 25 steps (FD 0.8), and of students: training, step count, FD by seed."""
    cells = [Cell("fashion-flow", 25, 20)]
    write_result(folder, cells[0], result(cells[0], 0.8), None)
    for training, steps, values in rows:
        for seed, fd in enumerate(values):
            cells.append(Cell("fashion-flow", steps, 20, training, seed))
            write_result(folder, cells[-1], result(cells[-1], fd), None)
    return evidence_of(compare(cells, folder))


def test_the_best_of_each_method_and_case_is_kept(tmp_path: Path) -> None:
    sid = Training("sid", "sid", seeds=(0, 1, 2), settings={"lr": 1e-4, "checkpointing_steps": 7}, **FLOW)
    evidence = rows(
        tmp_path,
        (sid, 4, [0.4, 0.5, 0.6]),
        (Training("sid-worse", "sid", **FLOW), 4, [0.9]),
        (Training("dmd2", "dmd2", settings=GAN, **FLOW), 4, [0.45]),
        (Training("shared", "rectified_flow", at=(1, 4), **FLOW), 1, [1.0]),
    )
    found = {(one.method, one.steps): one for one in evidence.candidates}
    assert evidence.spread == 1.5
    assert found.keys() == {("sid", 4), ("dmd2", 4), ("rectified_flow", 1)}
    one = found["sid", 4]
    assert (one.kind, one.images, one.fd, one.lowest, one.highest, one.seeds) == ("flow", False, 0.5, 0.4, 0.6, 3)
    assert (one.cell, one.teacher, one.teacher_steps, one.over) == ("sid_fashion-flow_4", "fashion-flow", 25, 0.62)
    assert one.passes == 1000 + 3 * 2000
    assert one.settings["lr"] == 1e-4 and one.settings["max_steps"] == 200
    assert one.settings.keys().isdisjoint({"steps", "seed", "teacher", "out", "checkpointing_steps", "report_to"})
    assert found["dmd2", 4].images and "data" not in found["dmd2", 4].settings
    assert "| flow | 4 | `dmd2` (`dmd2_fashion-flow_4`), 0.56 | `sid` (`sid_fashion-flow_4`), 0.62 |" in choices_table(
        evidence
    )


def test_who_fills_holes_says_nothing_of_who_makes_whole_pictures(tmp_path: Path) -> None:
    cells = [
        Cell("fashion-inpaint", 25, 20),
        Cell("fashion-inpaint", 4, 20, Training("a", "dmd2", "fashion-inpaint", 4, settings={"data": "targets"})),
    ]
    for cell in cells:
        write_result(tmp_path, cell, result(cell, 0.1), None)
    assert evidence_of(compare(cells, tmp_path)).candidates == ()


def test_what_claims_nothing_is_never_chosen(tmp_path: Path) -> None:
    evidence = rows(
        tmp_path,
        (Training("sid", "sid", gated=False, **FLOW), 4, [0.1]),
        (Training("scratch", "sid", scratch=True, **FLOW), 4, [0.1]),
        (Training("dmd2", "dmd2", settings=GAN, **FLOW), 4, [0.9]),
    )
    assert [one.method for one in evidence.candidates] == ["dmd2"]


def test_a_cell_means_the_run_that_made_it(tmp_path: Path) -> None:
    """Chosen for its own teacher, it is configured as the cell was, what is watched and kept apart."""
    training = Training("f-distill", "dmd2", settings={"data": "fashion", "f_divergence": "js"}, **FLOW)
    evidence = rows(tmp_path, (training, 4, [0.6]))
    given = {"teacher": "fashion-flow", "out": "o", "data": "fashion", "report_to": "none"}
    told = {"checkpointing_steps": 300, "sample_steps": 300}
    assert decide({**given, **told}, None, evidence).config == training.config(0, "o")


def test_what_ships_is_made_of_the_committed_results() -> None:
    plan = read_plan()
    evidence = evidence_of(compare(plan.cells(seeds_kept(plan, ROOT / RESULTS)), ROOT / RESULTS))
    if evidence.text() != SHIPPED.read_text(encoding="utf-8"):
        pytest.fail("run python -m fewstep.eval.methods --table --readme docs/methods.md", pytrace=False)
