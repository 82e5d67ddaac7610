"""What stops a pipeline from drawing a part of its network's input anew in every step: tried, and said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fewstep.recording.errors import ANOTHER, RecordingError
from fewstep.recording.loop.fresh import fresh_samples
from fewstep.recording.rules.item_fit import RedrawnError, fit_entries
from fewstep.recording.watch.observation import Step, Stub
from fewstep.recording.watch.subject import Subject


def say_what_stops(error: RedrawnError, subject: Subject, check: Callable[[Subject], object]) -> RecordingError:
    """The error with the argument of the call that stops the drawing where it is zero.

    Args:
        error: what was seen.
        subject: the pipeline with guidance off.
        check: raises a RecordingError where a subject still draws.
    """
    invocation = subject.invocation
    for name in invocation.parameters:
        value = invocation.default(name)
        if not isinstance(value, float) or not value or name in subject.off:
            continue
        try:
            check(replace(subject, invocation=replace(invocation, call={**invocation.call, name: 0.0})))
        except RecordingError:
            continue
        return RecordingError(f"{error}: the pipeline draws them anew; give {name}=0 in the call, which stops that")
    return RecordingError(f"{error}; what follows the trajectory cannot be recorded: {ANOTHER}")


def entries_stand(component: str, runs: list[list[Step]]) -> Callable[[Subject], object]:
    """A check of :func:`say_what_stops`: nothing of the arguments of the first of these runs is redrawn."""
    first = runs[0]
    stub = Stub((component,), first[0].calls[-1].output)

    def check(subject: Subject) -> None:
        again = subject.run(len(first), steps=len(first), stub=stub, replace=fresh_samples(0)).steps
        fit_entries(component, [again, again])

    return check
