"""Where a pipeline's walk starts: only walks from noise alone can be distilled, and some are shortened by a default."""

from __future__ import annotations

from dataclasses import replace

from fewstep.recording.errors import RecordingError
from fewstep.recording.watch.observation import Observation
from fewstep.recording.watch.subject import Subject

# Enough to see a walk that leaves out one step in a hundred: where the first step lies is known before it is made.
_STEPS = 25


def skipped_steps(seen: Observation) -> int:
    """How many of its scheduler's first steps a run left out."""
    if seen.timesteps is None or not seen.steps:
        return 0
    times = seen.timesteps.double().flatten()
    return int((times - seen.steps[0].timestep).abs().argmin())


def from_noise_alone(subject: Subject) -> Subject:
    """The subject whose call makes its scheduler's whole walk: a share below one that shortens it (a strength) is one.

    Which argument that is, is tried: the one of those between 0 and 1 that makes the first step the scheduler's own.
    """
    if not _shortened(subject):
        return subject
    invocation = subject.invocation
    for name in invocation.parameters:
        value = invocation.default(name)
        if isinstance(value, float) and 0 < value < 1:
            whole = replace(subject, invocation=replace(invocation, call={**invocation.call, name: 1.0}))
            if not _shortened(whole):
                return whole
    return subject


def _shortened(subject: Subject) -> bool:
    try:
        seen = subject.run(_STEPS, steps=1)
    except RecordingError:
        return False  # what is wrong with the call is said by who makes it next
    return not seen.steps or skipped_steps(seen) > 0
