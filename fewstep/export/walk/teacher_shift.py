"""The shift of a flow teacher's own grid at the recorded call, and at others: what its pipeline computes there.

Some pipelines shift the grid by the number of tokens (Flux), some by the number of steps as well (Flux.2). So the
pipeline is run with everything that the recorded call says, up to ``set_timesteps``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fewstep.diffusion.schedule import FlowSchedule, NoiseSchedule
from fewstep.diffusion.timesteps import shift_time
from fewstep.export.errors import ExportError
from fewstep.export.walk.trace import Trace, trace
from fewstep.recording.pipeline import find_scheduler

if TYPE_CHECKING:
    from fewstep.recording import Recording

# Spacings that leave the even grid behind; its shift is still what the pipeline says.
_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")


def shifts_by_size(recording: Recording) -> bool:
    """Whether the teacher is a flow model whose scheduler leaves the shift to its pipeline."""
    return isinstance(recording.schedule, FlowSchedule) and bool(teacher_config(recording).get("use_dynamic_shifting"))


def teacher_shift(recording: Recording, changes: Mapping[str, Any] | None = None, *, steps: int | None = None) -> float:
    """The k of the teacher's own flow grid t' = k t / (1 + (k - 1) t) at the recorded call.

    Args:
        recording: of the teacher.
        changes: to the recorded call, another height and width say.
        steps: of the grid; None: as many as the teacher makes by itself.

    Raises:
        ExportError: the pipeline leaves the shift open, or its scheduler makes another grid of it than this formula.
    """
    config = teacher_config(recording)
    if not config.get("use_dynamic_shifting"):
        return float(config.get("flow_shift") or config.get("shift") or 1.0)
    count = steps or recording.invocation.steps or 50
    seen = trace(recording.pipeline, recording.subject.call(count, changes=changes), None)
    name, mu = type(recording.pipeline).__name__, seen.asked.get("mu")
    if mu is None:
        raise ExportError(f"{name} shifts its grid by the resolution but passes no mu; state the shift (--shift)")
    shift = float(mu) if config.get("time_shift_type") == "linear" else math.exp(float(mu))
    if not (math.isfinite(shift) and shift > 0):
        raise ExportError(f"{name} passes mu={float(mu):g}, of which no shift can be made; state one (--shift)")
    _refuse_other_grid(name, config, seen, shift, recording.schedule)
    return shift


def teacher_config(recording: Recording) -> Any:
    """The config of the teacher's own scheduler."""
    return getattr(recording.pipeline, find_scheduler(recording.pipeline)).config


def _refuse_other_grid(name: str, config: Any, seen: Trace, shift: float, schedule: NoiseSchedule) -> None:
    """The grid that the pipeline was seen to get is the one of the shift, where the pipeline passes its own sigmas."""
    if seen.asked.get("sigmas") is None or any(config.get(spacing) for spacing in _SPACINGS):
        return
    expected = shift_time(torch.as_tensor(seen.asked["sigmas"]), shift)
    if terminal := config.get("shift_terminal"):
        expected = 1 - (1 - expected) * (1 - terminal) / (1 - expected[-1])
    got = schedule.time(torch.tensor(seen.timesteps, dtype=torch.float64))
    # Some schedulers truncate their timesteps to integers.
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=0, atol=2e-3):
        raise ExportError(
            f"{name} asks its scheduler for a shift of {shift:.4g} and gets another grid; state the shift (--shift)"
        )
