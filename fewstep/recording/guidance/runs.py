"""Guided runs of a pipeline at several values of its scales, from which the way is read that it weighs its answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.recording.call.invocation import Invocation
from fewstep.recording.call.numbers import SCALES
from fewstep.recording.errors import RecordingError
from fewstep.recording.guidance.weighing import GuidedRun
from fewstep.recording.loop.denoisers import Denoisers
from fewstep.recording.loop.experts import components_of
from fewstep.recording.watch.observation import Stub
from fewstep.recording.watch.subject import Subject

_STEPS = 4
# Runs at several scales tell a number of the sum from an argument of the call.
_RUNS = 4


def scale_arguments(invocation: Invocation) -> list[str]:
    """The arguments of the pipeline's call that hold a guidance scale."""
    return [name for name in invocation.parameters if name.endswith(SCALES)]


def guided_runs(
    subject: Subject, denoisers: Denoisers, changes: dict[str, Any], name: str, scale: float
) -> list[GuidedRun]:
    """Guided runs at several values of every scale of the call, the first at its own.

    Args:
        subject: with guidance off.
        denoisers: of its loop.
        changes: to the call, which make it a guided one.
        name: of the argument that guides.
        scale: its value.
    """
    invocation = subject.invocation
    own = {argument: invocation.default(argument) for argument in scale_arguments(invocation)} | {name: scale}
    values = {argument: float(value) for argument, value in own.items() if isinstance(value, int | float)}
    runs = [_run(subject, denoisers, changes, values)]
    for number in range(1, _RUNS):
        # Other differences for each, so that no two scales are mistaken for each other.
        other = {one: value + number * (0.5 + 0.35 * place) for place, (one, value) in enumerate(values.items())}
        try:
            runs.append(_run(subject, denoisers, {**changes, **other}, other))
        except RecordingError:  # a scale that the pipeline refuses: the guiding one alone
            other = values | {name: scale + number}
            runs.append(_run(subject, denoisers, {**changes, name: other[name]}, other))
    return runs


def _run(subject: Subject, denoisers: Denoisers, changes: dict[str, Any], values: dict[str, float]) -> GuidedRun:
    # Noise in the place of answers shows the sum whatever the weights are.
    stub = Stub(components_of(denoisers.experts), live=frozenset({0}), scramble=True)
    steps = subject.run(_STEPS, changes=changes, steps=3, stub=stub).steps[1:]
    first = denoisers.experts[0].component
    steps = [step for step in steps if all(call.component == first for call in denoisers.calls(step))] or steps[:1]
    answers = [denoisers.answers(step) for step in steps]
    columns: list[Tensor] = [torch.cat(column) for column in zip(*answers, strict=True)]
    return GuidedRun(values, columns, torch.cat([step.model_output[:1] for step in steps]))
