"""When a student's control network has a say: its pipeline switches it by the step's number, at every count anew."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fewstep.export.errors import ExportError, SchedulerCheckError
from fewstep.recording.errors import RecordingError
from fewstep.recording.pipeline import find_scheduler, with_parts
from fewstep.recording.second.switch import walk_of

if TYPE_CHECKING:
    from fewstep.recording import Recipe, Recording


def as_walked(recording: Recording, pipeline: Any, call: dict[str, Any], count: int) -> Recording:
    """The recording with its second network switched at the times at which the student's pipeline switches it.

    Args:
        recording: of the teacher.
        pipeline: with the student's scheduler.
        call: the student's.
        count: how many steps it makes.

    Raises:
        ExportError: it is never on there, so that a student would not look at its picture.
        SchedulerCheckError: the pipeline does not walk so.
    """
    steps = _switched(recording, pipeline, call, count)
    second = recording.recipe.second
    if steps is None or second is None or second.switch is None:
        return recording
    if not any(on for _, on in steps):
        raise ExportError(
            f"{type(pipeline).__name__} never switches its {second.component} on in {count} "
            f"step{'s' * (count != 1)}, so such a student would not look at its picture; take more steps, or let the "
            "call switch it off later (control_guidance_end, for one)"
        )
    try:
        switch = second.switch.at(steps)
    except RecordingError as error:
        raise ExportError(str(error)) from error

    def as_switched(recipe: Recipe) -> Recipe:
        own = None if recipe.second is None else replace(recipe.second, switch=switch)
        return replace(recipe, second=own, sizes=tuple(map(as_switched, recipe.sizes)))

    return replace(recording, recipe=as_switched(recording.recipe))


def as_student(recording: Recording, scheduler: Any, call: dict[str, Any], steps: int) -> Recording:
    """The recording with its second network, where it has one, switched as in its student's walk.

    Args:
        recording: of the teacher.
        scheduler: the student's.
        call: likewise.
        steps: likewise.

    Raises:
        ExportError: as of :func:`as_walked`.
        SchedulerCheckError: likewise.
    """
    if recording.recipe.second is None:
        return recording
    pipeline = with_parts(recording.pipeline, **{find_scheduler(recording.pipeline): scheduler})
    return as_walked(recording, pipeline, call, steps)


def walks_alike(recording: Recording, pipeline: Any, call: dict[str, Any], count: int) -> bool:
    """Whether a walk of `count` steps is under control where the recording's function of the time is."""
    steps = _switched(recording, pipeline, call, count)
    second = recording.recipe.second
    return steps is None or second is None or second.switch is None or second.switch.agrees(steps)


def _switched(recording: Recording, pipeline: Any, call: dict[str, Any], count: int) -> list[tuple[float, bool]] | None:
    """The timesteps of a walk, and whether the second network is on there; None where nothing switches it."""
    second = recording.recipe.second
    if second is None or second.switch is None:
        return None
    subject = replace(recording.subject, pipeline=pipeline)
    try:
        return walk_of(subject, second, recording.components, count, call)
    except RecordingError as error:
        raise SchedulerCheckError(str(error)) from error
