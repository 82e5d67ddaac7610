"""Wishes of how a student shall move that mean nothing for its teacher, each refused in one line."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule, TrigFlowSchedule
from fewstep.export.errors import ExportError

if TYPE_CHECKING:
    from fewstep.recording import Recording


def refuse(
    recording: Recording,
    steps: int,
    renoise: str,
    shift: float | None,
    first_timestep: int | None,
    first_sigma: float | None,
    start: str,
    gamma: float | None,
) -> None:
    """Raise ``ExportError`` for a wish of :func:`fewstep.export.walk.plan.plan_student` that means nothing."""
    schedule = recording.schedule
    if renoise not in ("auto", "ode", "fresh", "tcd"):
        raise ExportError(f"renoise is auto, ode, fresh or tcd, not {renoise!r}")
    if renoise == "tcd" and (gamma is None or not 0 < gamma <= 1):
        raise ExportError(f"renoise tcd needs a gamma in (0, 1], not {gamma}")
    if start not in ("noise", "marginal"):
        raise ExportError(f"start is noise or marginal, not {start!r}")
    if steps < 1:
        raise ExportError(f"steps must be at least 1, not {steps}")
    if isinstance(schedule, TrigFlowSchedule):
        raise ExportError("a TrigFlow teacher is a few-step student itself, and no stock scheduler carries another one")
    if shift is not None and not isinstance(schedule, FlowSchedule):
        raise ExportError("shift belongs to flow-matching teachers; this one has a table or a ramp of its own")
    if shift is not None and not (math.isfinite(shift) and shift > 0):
        raise ExportError(f"shift must be a positive number, not {shift}")
    if isinstance(schedule, EDMSchedule) and (first_timestep is not None or start != "noise"):
        raise ExportError("an EDM student starts at sigma_max or at first_sigma")
    if first_sigma is not None and not isinstance(schedule, EDMSchedule):
        raise ExportError("first_sigma belongs to EDM teachers; a table's student starts at first_timestep")
    if first_sigma is not None and isinstance(schedule, EDMSchedule):
        low, high = schedule.sigma_min, schedule.sigma_max
        if not low < first_sigma <= high:
            levels = f"({low:g}, {high:g}], the noise levels of the teacher"
            raise ExportError(f"first_sigma must be in {levels}, not {first_sigma:g}")
    if isinstance(schedule, FlowSchedule) and (first_timestep is not None or start != "noise"):
        raise ExportError("a flow student starts at pure noise, timestep 1000")
    times = schedule.num_train_timesteps or (
        round(schedule.timestep_scale) if isinstance(schedule, FlowSchedule) else 1000
    )
    if first_timestep is not None and not 0 <= first_timestep < times:
        raise ExportError(f"first_timestep must be in 0..{times - 1}, not {first_timestep}")
    available = times if first_timestep is None else first_timestep + 1
    if steps > available:
        raise ExportError(f"{steps} steps are more than the {available} times of the schedule")
    if isinstance(schedule, TableSchedule):
        top = available - 1
        if recording.prediction_type == "epsilon" and float(schedule.alphas_cumprod[top]) == 0:
            raise ExportError(
                f"the teacher predicts noise, and at timestep {top} its input is only noise (zero terminal SNR); "
                f"start lower (first_timestep={top - 1})"
            )
