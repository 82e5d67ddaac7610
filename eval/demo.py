"""The demo: an embedded teacher in, a few-step student out, both measured side by side."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import yaml

from fewstep.errors import UserError
from fewstep.eval import known_rows
from fewstep.eval.during import evaluator_of
from fewstep.eval.evaluate import evaluate
from fewstep.eval.report import Report
from fewstep.fashion import TEXT_TEACHERS
from fewstep.programs import distillation
from fewstep.programs.methods import method_class

METHOD = "dmd2"
#: Samples in every row, those of the teacher's shipped rows. Quoted reports have 5,000; the demo has to end while
#: somebody waits.
DEMO_SAMPLES = known_rows.NUM
#: Rounds of timed calls, and the seconds after which none begins: the quartiles of a few are wide.
LATENCY_CALLS, LATENCY_BUDGET = 5, 10.0


def recipe_of(teacher: str) -> Traversable:
    """The file of the shipped recipe for an embedded teacher."""
    return files("fewstep.trainers") / "configs" / f"{METHOD}_{teacher.replace('-', '_')}.yaml"


def demo(
    teacher: str = "fashion-sd",
    out: Path | str = "runs/demo",
    *,
    steps: int = 4,
    seed: int = 0,
    max_steps: int | None = None,
    num: int | None = None,
    measure_teacher: bool = False,
) -> Report:
    """Distil ``teacher`` to ``steps`` with DMD2 and evaluate it; a second call goes on where the first one stopped.

    Args:
        teacher: name of an embedded teacher.
        out: folder of the run; the report lands in ``out/report``.
        steps: the student's step count.
        seed: of the training.
        max_steps: training steps, default the shipped recipe's.
        num: samples in every row of the report.
        measure_teacher: measure the teacher's rows here, also where they ship with the package.

    Raises:
        UserError: there is no such teacher, or ``out`` holds another run.
    """
    if teacher not in TEXT_TEACHERS:
        raise UserError(f"--teacher of the demo is one of {', '.join(TEXT_TEACHERS)}, not {teacher!r}")
    out = Path(out)
    settings = yaml.safe_load(recipe_of(teacher).read_text(encoding="utf-8"))
    settings |= {"teacher": teacher, "data": "fashion", "out": str(out), "steps": steps, "seed": seed}
    if max_steps is not None:
        settings["max_steps"] = max_steps
    config = method_class(METHOD).Config(**settings, resume=(out / "config.yaml").exists())
    student = distillation.run(config, METHOD, evaluator=evaluator_of)
    counts = sorted({steps, *(count for count in (1, 2, 4, 8) if count < steps)})
    return evaluate(
        [student],
        teacher=teacher,
        teacher_steps=known_rows.STEPS,
        measure_teacher=measure_teacher,
        steps=counts,
        num=num or DEMO_SAMPLES,
        images="shown",
        latency_calls=LATENCY_CALLS,
        latency_budget=LATENCY_BUDGET,
        out=out / "report",
    )
