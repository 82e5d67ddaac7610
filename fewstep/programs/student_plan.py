"""What a run's student will be, planned as its settings say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewstep.config.run import RunConfig
from fewstep.errors import UserError
from fewstep.export import plan_student
from fewstep.export.errors import ExportError, NoRenoisingError
from fewstep.export.walk.plan import StudentPlan
from fewstep.recording import Recording

#: What is done without new noise between the steps, and the settings that do it.
_WAYS_OUT: dict[str, dict[str, Any]] = {
    "--renoise ode": {"renoise": "ode"},
    "--steps 1, which needs none": {"steps": 1, "renoise": "auto"},
}


def planned(given: RunConfig, recording: Recording) -> StudentPlan:
    """The student of a run.

    Args:
        given: the run's settings as they were given, of which its way out of a refusal is looked for.
        recording: of its teacher.

    Raises:
        ExportError: no such student can ship; one line names the reason, and where noise between the steps is that,
            a setting that this method takes instead.
    """
    config = given.resolved()
    try:
        return plan_student(
            recording,
            config.steps,
            renoise=config.renoise,
            shift=config.shift,
            first_timestep=config.first_timestep,
            first_sigma=config.first_sigma,
            start=config.start,
            dynamic_shift=config.dynamic_shift,
            gamma=config.walk_gamma,
            times=config.walk_times,
        )
    except NoRenoisingError as error:
        ways = [words for words, changed in _WAYS_OUT.items() if _takes(given, **changed)]
        raise ExportError(f"{error}; take {ways[0] if ways else 'another method'}") from error


def _takes(given: RunConfig, **changed: Any) -> bool:
    try:
        replace(given, **changed).resolved()
    except UserError:
        return False
    return True
