"""The embedded teachers' rows that ship with the package: they are of what is here, and of nothing else."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest

from fewstep.eval import EvalConfig, evaluate
from fewstep.eval.evaluate import prepared
from fewstep.eval.known_rows import METRICS, NUM, STEPS, KnownRow, content_of, known_row
from fewstep.eval.sources import ModelSource
from fewstep.fashion import TEXT_TEACHERS

RESULTS = Path(__file__).resolve().parents[2] / "eval" / "results"


def sources(name: str, tmp_path: Path, **options: object) -> list[ModelSource]:
    told = {"num": NUM, "teacher_steps": STEPS, "metrics": METRICS, "out": tmp_path, "teacher": name, **options}
    return prepared([], EvalConfig(**told)).sources


@pytest.mark.parametrize("name", TEXT_TEACHERS)
def test_what_ships_is_of_the_teachers_that_ship(name: str, tmp_path: Path) -> None:
    for source in sources(name, tmp_path):
        row = known_row(source)
        assert row is not None, f"run python -m fewstep.eval.teacher_rows: {source.title} has changed"
        assert row.nfe == 2 * source.steps and {"fd_test", "agreement", "recall", "coverage"} <= set(row.metrics)
        # The committed cell has 5,000 samples.
        cell = json.loads((RESULTS / f"teacher_{name}_{source.steps}.json").read_text())
        assert 0.95 < row.metrics["fd_test"] / cell["metrics"]["fd_test"] < 1.2
        assert row.metrics["agreement"] == pytest.approx(cell["metrics"]["agreement"], abs=0.02)


@pytest.mark.parametrize(
    "change", [{"num": NUM + 1}, {"seed": 1}, {"teacher_call": {"guidance_scale": 1.0}}, {"classes": (1, 2)}]
)
def test_another_row_is_not_known(change: dict, tmp_path: Path) -> None:
    assert [known_row(source) for source in sources("fashion-sd", tmp_path, **change)] == [None] * len(STEPS)


def test_a_student_is_never_known(tmp_path: Path) -> None:
    source = sources("fashion-sd", tmp_path)[0]
    source.model = dataclasses.replace(source.model, role="student")
    assert content_of(source) is None and known_row(source) is None


def test_a_known_row_makes_the_shown_samples_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    inner = ModelSource.make
    monkeypatch.setattr(ModelSource, "make", lambda self, indices: (made.extend(indices), inner(self, indices))[1])
    numbers = {"fd_test": 7.5, "agreement": 0.5, "recall": 0.1}
    row = KnownRow("content", 2.0, numbers, {}, {"fewstep": "0", "torch": "9"})
    monkeypatch.setattr(importlib.import_module("fewstep.eval.evaluate"), "known_row", lambda source: row)
    options = {"teacher": "fashion-sd", "teacher_steps": (1,), "columns": 3, "num": 40, "metrics": ("fd_test", "prdc")}
    report = evaluate([], out=tmp_path / "known", measure_teacher=False, **options)
    assert made == [0, 1, 2] and report.rows[0]["metrics"] == {"fd_test": 7.5, "recall": 0.1}
    assert report.rows[0]["num"] == 40 and any("ship with the package" in note for note in report.notes)
    report = evaluate([], out=tmp_path / "measured", **options)
    assert len(made) == 43 and report.rows[0]["metrics"]["fd_test"] != 7.5
