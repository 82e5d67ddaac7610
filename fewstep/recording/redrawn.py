"""What stops a pipeline from drawing a part of its network's arguments anew in every step: tried, and said."""

from __future__ import annotations

from dataclasses import replace

from fewstep.recording.errors import RecordingError
from fewstep.recording.fresh import fresh_samples
from fewstep.recording.item_fit import RedrawnError, fit_entries
from fewstep.recording.observation import Step, Stub
from fewstep.recording.subject import Subject


def say_what_stops(error: RedrawnError, subject: Subject, component: str, runs: list[list[Step]]) -> RecordingError:
    """The error with the argument of the call that stops the drawing where it is zero.

    Args:
        error: what was seen.
        subject: the pipeline with guidance off.
        component: its network.
        runs: in which that was seen; the first is repeated, its network stubbed.
    """
    invocation, first = subject.invocation, runs[0]
    stub = Stub((component,), first[0].calls[-1].output)
    for name in invocation.parameters:
        value = invocation.default(name)
        if not isinstance(value, float) or not value or name in subject.off:
            continue
        still = replace(subject, invocation=replace(invocation, call={**invocation.call, name: 0.0}))
        try:
            again = still.run(len(first), steps=len(first), stub=stub, replace=fresh_samples(0)).steps
            fit_entries(component, [again, again])
        except RecordingError:
            continue
        return RecordingError(f"{error}: the pipeline draws them anew; give {name}=0 in the call, which stops that")
    return RecordingError(f"{error}; what follows the trajectory cannot be recorded")
