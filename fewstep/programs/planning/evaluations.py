"""What the evaluations of a training (``--eval_steps``) cost in network calls, beside its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fewstep.config.run import RunConfig
from fewstep.programs.planning.call_counts import Calls, forward_passes
from fewstep.teachers.names import embedded_name
from fewstep.training.samples import TEACHER_STEPS


@dataclass(frozen=True)
class Evaluations:
    """Of a whole run that ends at its last step, all processes together.

    Attributes:
        count: before the first step, every so many, and after the last.
        samples: in each.
        student: calls of the student for all of them, in samples.
        teacher: calls of the teacher, once, for the samples that the student's are compared with; of the embedded
            teachers there are real images.
        share: of the forward passes that the training's steps take.
    """

    count: int
    samples: int
    student: int
    teacher: int
    share: float


def evaluations_of(config: RunConfig, guided: bool, calls: Mapping[str, Calls]) -> Evaluations | None:
    """Those of a run; None where there are none.

    Args:
        config: of the run.
        guided: whether the teacher is asked twice in each step of its own.
        calls: network calls of a training step, per sample.
    """
    if not config.eval_steps:
        return None
    count = 1 + config.max_steps // config.eval_steps + (config.max_steps % config.eval_steps > 0)
    student = count * config.eval_samples * config.steps
    embedded = embedded_name(config.teacher) is not None
    teacher = 0 if embedded else config.eval_samples * TEACHER_STEPS * (2 if guided else 1)
    trained = config.max_steps * config.batch_size * config.gradient_accumulation_steps
    share = (student + teacher) / (trained * forward_passes(dict(calls)))
    return Evaluations(count, config.eval_samples, student, teacher, share)
