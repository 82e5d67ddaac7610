"""The evaluation: students and their teacher, the same seeds and conditions, one row per model and step count."""

import dataclasses
import importlib.metadata
import json
import logging
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fewstep.data.conditions import read_classes
from fewstep.data.durable import json_sha256, write_durably
from fewstep.errors import UserError
from fewstep.eval.config import QUOTABLE, EvalConfig
from fewstep.eval.features import FashionExtractor, fashion_reference
from fewstep.eval.generate import NonFiniteImagesError, SampleConditions
from fewstep.eval.grid import GridRow, draw_grid
from fewstep.eval.judge import Judge
from fewstep.eval.metrics.table import IMAGE_METRICS
from fewstep.eval.models import Model, in_steps, student_model, teacher_model
from fewstep.eval.report import Measure, Report, protocol
from fewstep.eval.report.pictures import write_pictures
from fewstep.eval.rows import measure, read_row, row_key, write_row
from fewstep.export.card.card import write_numbers
from fewstep.version import __version__

logger = logging.getLogger(__name__)

CLOCK = ("latency_ms", "latency_p90_ms", "images_per_second")


def evaluate(
    students: Sequence[str | Path | Model | Any],
    config: EvalConfig | None = None,
    *,
    judge: Judge | None = None,
    **options: Any,
) -> Report:
    """Measure students beside their teacher; write ``report.json``, ``report.md`` and ``grid.png`` into ``config.out``.

    students: folders, hub ids, pipelines of `fewstep.load`, or `Model` objects.

    options: fields of `EvalConfig`, over those of `config`. judge: extractor and reference to use instead of the
    embedded ones. Finished rows are kept in ``out/rows`` and reused by the next run of the same configuration.

    Raises UserError with one line, for whatever a caller can get wrong.
    """
    known = {item.name for item in dataclasses.fields(EvalConfig)}
    if set(options) - known:
        raise UserError(f"unknown option {', '.join(sorted(set(options) - known))}")
    config = dataclasses.replace(config or EvalConfig(), **options)
    models = _models(students, config)
    fashion = any(model.embedded for model in models)
    if not fashion:
        config = _with_trained_classes(config, models)
    plans = [(model, _conditions(model, config, fashion)) for model in models]
    if judge is None and _is_fashion(config, plans, fashion):
        judge = Judge(FashionExtractor(config.torch_device), fashion_reference())
    try:
        (config.out / "rows").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {config.out}: {error.strerror}") from error

    rows: list[dict[str, Any]] = []
    pictures: list[GridRow] = []
    skipped: list[str] = []
    for model, conditions in plans:
        pipeline = None
        for steps in _step_counts(model, config, skipped):
            key = row_key(model, conditions, steps, config, judge)
            cached = read_row(config.out, key)
            if cached is None:
                pipeline = pipeline or model.load(config.torch_device, getattr(torch, config.dtype))
                try:
                    cached = measure(pipeline, model, conditions, steps, config, judge)
                except NonFiniteImagesError as error:
                    skipped.append(f"{model.name} at {in_steps(steps)} is left out: {error}.")
                    continue
                write_row(config.out, key, *cached)
            else:
                logger.info("%s at %d steps: taken from %s", model.name, steps, config.out / "rows")
            # The name is no part of the key: the same folder may stand in another list this time.
            row = _row({**cached[0], "model": model.name}, config, judge)
            skipped += row.pop("skipped")
            row["pictures"] = write_pictures(config.out, f"row_{len(rows):02d}", cached[1])
            rows.append(row)
            pictures.append(GridRow(f"{model.name}, {in_steps(steps)}", cached[1]))

    if not rows:
        raise UserError("nothing could be evaluated: " + " ".join(skipped))
    report = _report(rows, list(dict.fromkeys(skipped)), plans, config, judge)
    report.save(config.out)
    grid = draw_grid(pictures, report.conditions["shown"])
    write_durably(config.out / "grid.png", lambda path: grid.save(path, format="PNG"))
    _put_on_cards(models, report)
    return report


def _put_on_cards(models: Sequence[Model], report: Report) -> None:
    """Each student's card in a folder gets its own rows and the teacher's."""
    teacher = [row for row in report.rows if row["role"] == "teacher"]
    for model in models:
        folder = Path(model.source) if model.role == "student" and model.source else None
        own = [row for row in report.rows if row["model"] == model.name]
        if folder is None or not own or not (folder / "README.md").is_file():
            continue
        rows = {
            f"{'teacher' if row['role'] == 'teacher' else 'student'}, {in_steps(row['steps'])}": {
                "NFE": row["nfe"],
                **row["metrics"],
                **{name: row["speed"][name] for name in CLOCK if row["speed"]},
            }
            for row in [*teacher, *own]
        }
        try:
            write_numbers(folder, rows, " ".join(report.provenance()))
        except OSError as error:
            logger.warning("the card of %s is left as it is: %s", folder, error.strerror)


def _models(students: Sequence[str | Path | Model | Any], config: EvalConfig) -> list[Model]:
    """The teacher first, then the students, under distinct names."""
    if not students and config.teacher is None:
        raise UserError("nothing to evaluate: give a student's folder or a teacher")
    found = [given if isinstance(given, Model) else student_model(given, base=config.base) for given in students]
    teacher = (
        []
        if config.teacher is None
        else [teacher_model(config.teacher, config.teacher_call, found, config.teacher_files)]
    )
    for index, model in enumerate(found):
        if len(found) > 1 and model.source is not None and model.name == "student":
            folder = Path(model.source).resolve()
            told = folder.parent if folder.name in ("student", "student_lora") else folder
            model.name = f"student {index + 1} ({told.name})"
            # Readers of the report tell the teacher's rows by that word.
            if "teacher" in model.name:
                model.name = f"student {index + 1}"
    return teacher + found


def _with_trained_classes(config: EvalConfig, models: Sequence[Model]) -> EvalConfig:
    """Where nothing was asked for: the classes that the first student was distilled with (cards name no prompts)."""
    classes = next((model.training["classes"] for model in models if model.training.get("classes")), None)
    if classes is None or config.prompts is not None or config.classes is not None:
        return config
    return dataclasses.replace(config, classes=read_classes(classes))


def _conditions(model: Model, config: EvalConfig, fashion: bool) -> SampleConditions:
    """What the model's samples are asked for; `fashion`: the ten classes of Fashion-MNIST are the default."""
    from fewstep.fashion import PROMPTS

    kind = model.condition_kind()
    if kind == "prompt":
        if config.prompts is None and not fashion:
            raise UserError(f"{model.name} takes prompts, and none were given (--prompts FILE)")
        if config.prompts is None and any(not 0 <= k < len(PROMPTS) for k in config.classes or ()):
            raise UserError(f"classes must lie between 0 and {len(PROMPTS) - 1}")
        chosen = config.prompts or [PROMPTS[k] for k in config.classes or range(len(PROMPTS))]
        known = all(prompt in PROMPTS for prompt in chosen)
        return SampleConditions("prompt", tuple(chosen), tuple(PROMPTS.index(p) for p in chosen) if known else ())
    if kind == "label":
        if config.classes is None:
            raise UserError(f"{model.name} takes class labels, and none were given (--classes 0-9)")
        return SampleConditions("label", tuple(config.classes), tuple(config.classes))
    return SampleConditions()


def _is_fashion(config: EvalConfig, plans: Sequence[tuple[Model, SampleConditions]], fashion: bool) -> bool:
    """Whether the embedded reference is the right one: asked for, or the models or their prompts come from there."""
    if config.reference != "auto":
        return config.reference == "fashion"
    return fashion or any(conditions.kind == "prompt" and conditions.labels for _, conditions in plans)


def _step_counts(model: Model, config: EvalConfig, skipped: list[str]) -> list[int]:
    """The step counts to run; each refused one leaves its sentence in `skipped`."""
    if model.role == "teacher":
        return list(config.teacher_steps)
    reasons = {steps: model.why_not(steps) for steps in config.steps}
    skipped += [reason for reason in reasons.values() if reason]
    return [steps for steps, reason in reasons.items() if reason is None]


def _row(row: dict[str, Any], config: EvalConfig, judge: Judge | None) -> dict[str, Any]:
    """A row as reports have it: what the clock says stands beside its conditions."""
    metrics = {name: value for name, value in row["metrics"].items() if name not in CLOCK}
    clock = {name: row["metrics"][name] for name in CLOCK if name in row["metrics"]}
    speed = {**clock, **row["speed"]} if row["speed"] else None
    num = config.num if judge else min(config.num, max(config.columns, 2 * config.batch_size))
    row.pop("floor")
    return {**row, "num": num, "metrics": metrics, "spread": {}, "speed": speed}


def _measures(judge: Judge) -> dict[str, Measure]:
    """What the judge's numbers are."""
    fields = judge.fields(0)
    made = {
        name: Measure(
            title=name,
            group={"precision": "prdc", "recall": "prdc"}.get(name, name),
            format=metric.format,
            better="near" if name == "diversity" else "higher",
            extractor=fields["extractor"],
            weights_sha256=fields["weights_sha256"],
            resize=fields["resize"],
            reference=fields["id"],
            n_ref=fields["n_ref"],
        )
        for metric in IMAGE_METRICS
        for name in metric.names
    }
    floor = judge.reference.floor
    known = next((name for name, value in judge.reference.floors.items() if value == floor), "other real images")
    made["fd_test"] = dataclasses.replace(
        made["fd_test"],
        title=f"{fields['metric']} (test)",
        better="lower",
        floor=floor,
        floor_of="it was not measured" if floor is None else known,
    )
    return made


def _report(
    rows: list[dict[str, Any]],
    skipped: list[str],
    plans: Sequence[tuple[Model, SampleConditions]],
    config: EvalConfig,
    judge: Judge | None,
) -> Report:
    notes = []
    if judge and config.num < QUOTABLE:
        notes.append(
            f"Fewer than {QUOTABLE:,} samples raise every Fréchet distance: compare within this report, quote none."
        )
    if judge and config.num < 2 * judge.reference.features.shape[1]:
        notes.append("So few samples leave the covariance singular: the Fréchet distances are mostly bias.")
    asked = {label for _, conditions in plans for label in conditions.labels}
    if judge and asked and len(asked) < len(judge.reference.labels.unique()):
        notes.append(f"Only {len(asked)} classes were generated, and the reference holds all of them.")
    judged = any("fd_test" in row["metrics"] for row in rows)
    reference = judge.fields(config.num) if judge is not None and judged else None
    if judge and judged:
        floors = "; ".join(f"{name} {value:.3f}" for name, value in judge.reference.floors.items())
        notes += [f"{judge.reference.metric} (test) of others: {floors}."] if len(judge.reference.floors) > 1 else []
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    settings["students"] = [model.source for model, _ in plans if model.role == "student"]
    notes += [note for model, _ in plans if (note := model.guidance_note())]
    versions = {"fewstep": __version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "numpy")}
    asked_for = list(dict.fromkeys(conditions for _, conditions in plans))
    told = asked_for[0] if len(asked_for) == 1 else SampleConditions()
    return Report(
        protocol(
            num=config.num,
            seed=config.seed,
            conditions_sha256=json_sha256([dataclasses.asdict(conditions) for conditions in asked_for]),
            image_format="uint8, rounded half up",
        ),
        rows,
        _measures(judge) if judge is not None else {},
        config.num,
        config.seed,
        # What a column shows only where every row shows the same.
        {"kind": told.kind, "shown": [str(v) for v in told.take(range(config.columns))] if told.kind else []},
        reference,
        skipped,
        notes,
        settings,
        versions,
    )
