"""What ``fewstep distill auto`` chooses from, made of the same results as the table of all methods."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import fewstep.programs.choice
from fewstep.config.checks import names_of
from fewstep.eval.benchmark.cells import Training
from fewstep.eval.benchmark.comparison import Comparison, Row
from fewstep.programs.choice import Candidate, Evidence
from fewstep.teachers.kind import kind_of_scheduler, scheduler_of
from fewstep.teachers.source import find_source

#: The file that ships with the package.
SHIPPED = Path(fewstep.programs.choice.__file__).parent / fewstep.programs.choice.FILE


def evidence_of(comparison: Comparison) -> Evidence:
    """Of each method its best student for every kind of teacher, step count, and with or without real images.

    Students from scratch and those of which nothing is claimed are left out, and so are those whose teacher was not
    measured, or is shown a picture: who fills a hole is not judged as who makes a whole picture.

    Raises:
        UserError: a teacher's scheduler cannot be opened.
    """
    rows = [row for row in comparison.students(gated=True) if not _training(row).scratch and not row.shown]
    spreads = [max(values) / min(values) for row in rows if len(values := _distances(row)) > 1]
    all_of_them = Evidence(
        round(statistics.median(spreads), 3) if spreads else 1.0,
        tuple(one for row in rows if (one := _candidate(comparison, row)) is not None),
    )
    groups: dict[tuple[str, int, str, bool], list[Candidate]] = {}
    for one in all_of_them.candidates:
        groups.setdefault((one.kind, one.steps, one.method, one.images), []).append(one)
    best = [all_of_them.preferred(groups[key]) for key in sorted(groups)]
    return Evidence(all_of_them.spread, tuple(best))


def choices_table(evidence: Evidence) -> str:
    """What ``fewstep distill auto`` takes, as a table for people."""
    cases = sorted({(one.kind, one.steps) for one in evidence.candidates})
    titles = ["teacher's kind", "steps", "with real images", "without"]
    lines = [titles, ["---", "---:", "---", "---"]]
    for kind, steps in cases:
        taken = [evidence.in_order(kind, steps, images) for images in (True, False)]
        lines.append([kind, str(steps), *(_taken(order, steps) for order in taken)])
    head = "`fewstep distill auto` takes, with the FD over that of the teacher at its most steps:"
    return head + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _taken(order: Sequence[Candidate], steps: int) -> str:
    if not order or order[0].steps != steps:
        return ""
    return f"`{order[0].method}` (`{order[0].cell}`), {order[0].over:.2f}"


def _training(row: Row) -> Training:
    assert row.cell.training is not None  # as it is a student's
    return row.cell.training


def _distances(row: Row) -> list[float]:
    return [result.metrics["fd_test"] for result in row.results]


def _candidate(comparison: Comparison, row: Row) -> Candidate | None:
    training, distances = _training(row), _distances(row)
    over, teacher = comparison.over(row), comparison.teacher(training.teacher)
    if over is None or teacher is None:
        return None
    config = training.config(0)
    return Candidate(
        kind=kind_of_scheduler(scheduler_of(find_source(training.teacher), training.teacher)),
        steps=row.cell.steps,
        method=training.method,
        images=config.data is not None,
        fd=round(row.fd, 3),
        lowest=round(min(distances), 3),
        highest=round(max(distances), 3),
        over=round(over, 2),
        seeds=len(distances),
        passes=round(row.passes),
        cell=row.cell.name,
        teacher=training.teacher,
        teacher_steps=teacher.cell.steps,
        settings=_settings(training),
    )


def _settings(training: Training) -> dict[str, Any]:
    """What a run needs for the same student; what is of a machine, watched or given with every run is no part of it."""
    config = training.config(0)
    apart = names_of(type(config), "source", "machine", "watching", "export") | {"steps", "seed"}
    defaults = {one.name: one.default for one in fields(config)}
    return {name: value for name, value in config.as_dict().items() if name not in apart and value != defaults[name]}
