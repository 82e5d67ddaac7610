"""Pipelines that are few-step students already: their network is no teacher, and no proof of a recording would tell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fewstep.recording.call.invocation import Invocation
from fewstep.recording.errors import RecordingError
from fewstep.recording.pipeline import find_scheduler

# What the classes of schedulers of consistency models, flow maps and other distilled networks are called.
_SCHEDULERS = re.compile("LCM|TCD|SCM|CMStochastic|FlowMap|Piflow|(?<!E)DMD")  # EDMDPMSolver is a teacher's
# No pipeline of a many-step model makes so few steps when nobody states a number.
_FEW = 4


def refuse_few_step(pipeline: Any, invocation: Invocation) -> None:
    """Raise for a pipeline that says of itself, in one of four ways, that its network makes few steps.

    A student that says it in none of them (SDXL-Turbo, FLUX.1-schnell: a many-step model's scheduler and class) cannot
    be told from a teacher.
    """
    if (reason := _reason(pipeline, invocation)) is not None:
        raise RecordingError(f"{type(pipeline).__name__} {reason} is a few-step student already; record its teacher")


def _reason(pipeline: Any, invocation: Invocation) -> str | None:
    if (about := getattr(pipeline, "fewstep", None)) is not None:
        return f"(distilled by fewstep from {about.get('base_model')})"
    source = pipeline.config.get("_name_or_path")
    if source and (Path(source) / "fewstep.json").is_file():
        return f"({source} holds a fewstep.json)"
    scheduler = type(getattr(pipeline, find_scheduler(pipeline))).__name__
    if _SCHEDULERS.search(scheduler):
        return f"with {scheduler}"
    if pipeline.config.get("is_distilled") is True:
        return "(is_distilled in its model_index.json)"
    steps = invocation.parameters["num_inference_steps"]
    if isinstance(steps, int) and 0 < steps <= _FEW:
        return f"({steps} steps by default)"
    return None


def refuse_fixed_grid(pipeline: Any, steps: int, asked: int) -> None:
    """Raise for a pipeline that makes the few `steps` of its own whatever it is `asked`: so a distilled network is run.

    A scheduler may make one more, or twice as many; none that makes less than half of what it is asked can be trusted.
    """
    if steps < asked // 2:
        raise RecordingError(
            f"{type(pipeline).__name__} makes {steps} steps where {asked} were asked: a fixed list of steps is a "
            "few-step student's; record its teacher"
        )
