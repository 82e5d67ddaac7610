"""A report made of the rows that were measured."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.data.durable import as_json, json_sha256
from fewstep.eval.comparing import Comparison, covers
from fewstep.eval.conditions import SampleConditions
from fewstep.eval.config import QUOTABLE, EvalConfig
from fewstep.eval.judge import Judge
from fewstep.eval.measures import measures_of
from fewstep.eval.panel import Panel
from fewstep.eval.report import Report
from fewstep.eval.report.pictures import write_pictures
from fewstep.eval.report.protocol import protocol
from fewstep.eval.rows import Row
from fewstep.eval.sources import ModelSource
from fewstep.version import __version__

_LIBRARIES = ("torch", "diffusers", "transformers", "numpy")


def report_of(
    rows: Sequence[Row],
    timings: Sequence[dict[str, Any] | None],
    panel: Panel,
    comparison: Comparison,
    judges: Mapping[str, Judge],
    config: EvalConfig,
    skipped: Sequence[str],
) -> Report:
    """The report; its rows' pictures are written beside it.

    Args:
        rows: measured.
        timings: of the rows.
        panel: who judged.
        comparison: what with.
        judges: by the kind of their extractor.
        config: of the evaluation.
        skipped: sentences on rows that are not there.
    """
    if comparison.kind == "teacher":
        teachers = (row for row in rows if row.source.model.role == "teacher")
        own = next((row for row in teachers if row.source.steps == comparison.own_steps), None)
        comparison.floors = {} if own is None else dict(own.metrics)
    asked = list(dict.fromkeys(row.source.conditions for row in rows))
    told = asked[0] if len(asked) == 1 else SampleConditions()
    content = []
    for row, timing in zip(rows, timings):
        pictures = write_pictures(config.out, row.samples.name, row.samples.pictures(config.columns))
        content.append({**row.to_dict(), "speed": timing, "pictures": pictures})
    settings = {one.name: getattr(config, one.name) for one in dataclasses.fields(config)}
    if config.items is not None and not isinstance(config.items, str | Path):
        settings["items"] = f"{len(config.items)} from Python"
    settings = as_json(settings)
    settings["students"] = list(dict.fromkeys(r.source.model.source for r in rows if r.source.model.role == "student"))
    versions = {"fewstep": __version__, "python": platform.python_version()}
    return Report(
        protocol_of([row.source for row in rows], config),
        content,
        measures_of(panel, judges, comparison.floors, comparison.floor_of),
        rows[0].source.num,
        config.seed,
        {"kind": told.kind, "shown": [str(v) for v in told.take(range(config.columns))] if told.kind else []},
        comparison.identity,
        [*dict.fromkeys([*skipped, *_skipped(rows, panel)])],
        _notes(rows, panel, judges, asked),
        settings,
        versions | {name: importlib.metadata.version(name) for name in _LIBRARIES},
        optimised=_chosen_by(rows),
    )


def _chosen_by(rows: Sequence[Row]) -> list[str]:
    """The numbers by which a student's checkpoint was chosen, as its card says."""
    chosen = []
    for row in rows:
        training = row.source.model.training
        if training.get("eval_steps") and training.get("export_best"):
            # Where none was named: the first number of the embedded teachers' evaluator, or of any other's.
            default = "fd_test" if row.source.model.embedded else "kd_dino"
            chosen.append(training.get("eval_metric") or default)
    return list(dict.fromkeys(chosen))


def protocol_of(sources: Sequence[ModelSource], config: EvalConfig) -> dict[str, Any]:
    """What the numbers of rows depend on beside their models, and the networks that judge them."""
    asked = dict.fromkeys(source.conditions for source in sources)
    return protocol(
        num=sources[0].num,
        seed=config.seed,
        conditions_sha256=json_sha256([conditions.about() for conditions in asked]),
        image_format="uint8, rounded half up",
    )


def _skipped(rows: Sequence[Row], panel: Panel) -> list[str]:
    """One sentence for each group of metrics that is nowhere."""
    missing = panel.missing()
    # What nobody asked for and cannot be of these samples is no loss; a file that could be there is.
    unfit = {group: reason for row in rows for group, reason in row.reasons.items()} if panel.asked else {}
    unfit |= {group: reason for group, reason in panel.unfit.items() if panel.asked and group in panel.groups}
    return [f"{group} is skipped: {reason.rstrip('.')}." for group, reason in (missing | unfit).items()]


def _notes(
    rows: Sequence[Row], panel: Panel, judges: Mapping[str, Judge], asked: Sequence[SampleConditions]
) -> list[str]:
    """What a reader should know."""
    notes = []
    num = rows[0].source.num
    compared = any(judge.reference is not None for judge in judges.values())
    if compared and num < QUOTABLE:
        notes.append(
            f"Fewer than {QUOTABLE:,} samples raise every Fréchet distance: compare within this report, quote none."
        )
    judge = judges.get(panel.principal)
    if judge is not None and judge.reference is not None:
        if num < 2 * len(judge.reference.mean):
            notes.append("So few samples leave the covariance singular: the Fréchet distances are mostly bias.")
        labels = {label for conditions in asked for label in conditions.labels}
        if labels and not covers(judge, labels):
            notes.append(f"Only {len(labels)} classes were generated, and the reference holds all of them.")
        floors = "; ".join(f"{name} {value:.3f}" for name, value in judge.reference.floors.items())
        notes += [f"{judge.reference.metric} (test) of others: {floors}."] if len(judge.reference.floors) > 1 else []
    if known := next((row.known for row in rows if row.known is not None), None):
        by = ", ".join(f"{name} {known.versions[name]}" for name in ("fewstep", "torch") if name in known.versions)
        notes.append(
            f"The teacher's numbers ship with the package, measured with {by}; --measure_teacher does it here."
        )
    models = {id(row.source.model): row.source.model for row in rows}.values()
    notes += [note for model in models if (note := model.guidance_note())]
    return notes + [note for scorer in panel.scorers.values() if (note := scorer.note())]
