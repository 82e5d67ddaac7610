"""Schedulers that are handed a time for every token of a sample, as pipelines do that keep some tokens clean."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from fewstep.recording.errors import RecordingError

#: diffusers' name of the argument.
TOKEN_TIMES = "per_token_timesteps"


def velocity_sign(scheduler: Any, arguments: Mapping[str, Any]) -> float:
    """What turns the answer that a pipeline hands to ``scheduler.step`` into the scheduler's usual one: 1 or -1.

    diffusers' Euler of flow matching walks against what it is handed beside times for tokens, and along it elsewhere.
    So a copy of it is moved in both ways, and the directions are compared.

    Args:
        scheduler: as it is before the step.
        arguments: of the step, by name.

    Raises:
        RecordingError: a token's time is neither the step's nor 0, which is that of a token that stands still.
    """
    tokens, time = arguments.get(TOKEN_TIMES), float(arguments["timestep"])
    if tokens is None:
        return 1.0
    moving = tokens == time
    if not bool((moving | (tokens == 0)).all()):
        raise RecordingError(
            f"the pipeline hands its {type(scheduler).__name__} several times for the tokens of one sample (a "
            "condition of a strength below 1?); only walks with one time for what moves can be distilled: give "
            "conditions of strength 1"
        )
    sample, moved = arguments["sample"], []
    for times in (tokens, None):
        given = {**arguments, "model_output": torch.ones_like(sample), TOKEN_TIMES: times, "return_dict": False}
        result = type(scheduler).step(copy.deepcopy(scheduler), **given)[0]
        moved.append(result.double() - sample.double())
    return -1.0 if float((moved[0] * moved[1]).sum()) < 0 else 1.0
