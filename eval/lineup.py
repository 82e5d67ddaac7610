"""Which models an evaluation compares, and at which step counts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.errors import UserError
from fewstep.eval.config import EvalConfig
from fewstep.eval.models import Model, student_model, teacher_model


def line_up(students: Sequence[str | Path | Model | Any], config: EvalConfig) -> list[Model]:
    """The teacher first, then the students, under distinct names.

    Raises:
        UserError: there is none of them, or one cannot be found.
    """
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


def own_steps(teacher: Model, config: EvalConfig) -> int:
    """The step count that a teacher is used with: as it was told, or distilled at, else its pipeline's default.

    Raises:
        UserError: nothing says it.
    """
    from fewstep.fashion import TEACHERS

    told = (config.teacher_call or {}).get("num_inference_steps")
    if told is None and teacher.embedded is not None:
        told = TEACHERS[teacher.embedded].steps
    if told is None:
        told = teacher.training.get("teacher_steps")
    if told is None:
        parameter = inspect.signature(teacher.pipeline_class().__call__).parameters.get("num_inference_steps")
        told = None if parameter is None else parameter.default
    if not isinstance(told, int) or told < 1:
        raise UserError("the teacher's pipeline does not say how many steps it takes: give --teacher_steps")
    return told


def step_counts(models: Sequence[Model], config: EvalConfig, skipped: list[str]) -> list[list[int]]:
    """The step counts of each model. A refused one leaves its sentence in `skipped`.

    A student's own are those that its card says hold; the teacher's its own, and those of all students.
    """
    found: dict[int, list[int]] = {}
    for number, model in enumerate(models):
        if model.role == "student":
            own = sorted(model.counts) if model.counts else [model.steps or 1]
            wanted = list(dict.fromkeys(config.steps if config.steps is not None else own))
            reasons = {steps: model.why_not(steps) for steps in wanted}
            skipped += [reason for reason in reasons.values() if reason]
            found[number] = [steps for steps, reason in reasons.items() if reason is None]
    students = {steps for counts in found.values() for steps in counts}
    for number, model in enumerate(models):
        if model.role == "teacher":
            told = config.teacher_steps
            found[number] = list(dict.fromkeys(told)) if told is not None else _teachers(model, config, students)
    return [found[number] for number in range(len(models))]


def _teachers(model: Model, config: EvalConfig, students: set[int]) -> list[int]:
    own = own_steps(model, config)
    return sorted({own, *(steps for steps in students if steps < own)})
