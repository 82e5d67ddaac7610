"""The step counts that a loaded student is asked for: right ones pass, others are warned of, impossible refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from fewstep.export.errors import ExportError
from fewstep.recording.pipeline import find_scheduler


def heed_count(pipeline: Any, about: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Warn of a step count at which the student was not seen to be right.

    Args:
        pipeline: the student's.
        about: the content of its ``fewstep.json``.
        given: the arguments of a call, by name.

    Raises:
        ExportError: its scheduler has no grid of that count.
    """
    steps = next((given[name] for name in ("sigmas", "timesteps") if given.get(name) is not None), None)
    count = given.get("num_inference_steps") if steps is None else len(steps)
    counts = about.get("counts")
    if count is None or not counts or count in counts:
        return
    held = ", ".join(map(str, counts))
    config = getattr(pipeline, find_scheduler(pipeline)).config
    if count == 1 and config.get("shift_terminal"):
        # The grid is stretched to end at that time, and a single one, which starts at 1, is 0/0.
        raise ExportError(f"this student's scheduler has no grid of one step (it would be NaN); take one of {held}")
    warnings.warn(f"this student samples right at {held} steps, not at {count}", stacklevel=3)
