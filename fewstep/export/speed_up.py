"""The recording of a SpeedUpNet student: the teacher's pipeline with an adapter among its parts."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from typing import Any

import diffusers
from torch import nn

from fewstep.errors import UserError
from fewstep.networks.speed_up import SPEED_UP, SpeedUpRecipe
from fewstep.recording import Recording


def speed_up_recording(recording: Recording, adapter: nn.Module) -> Recording:
    """The recording as if the pipeline had this adapter on its network.

    Args:
        recording: of the teacher; it and its pipeline stay as they are.
        adapter: of :mod:`fewstep.pipelines.speed_up`.

    Raises:
        UserError: the teacher's pipeline is of no class of diffusers.
    """
    stock = type(recording.pipeline)
    if getattr(diffusers, stock.__name__, None) is not stock:
        raise UserError(f"{stock.__name__} is no class of diffusers; SpeedUpNet's student can be made of those only")
    recipe: Any = SpeedUpRecipe(recording.recipe, adapter)  # all that is asked of a Recipe
    return replace(recording, pipeline=with_adapter(recording.pipeline, adapter), recipe=recipe)


def with_adapter(pipeline: Any, adapter: nn.Module) -> Any:
    """Another pipeline of the same parts and an adapter, see :mod:`fewstep.pipelines.speed_up`."""
    plugged = copy.copy(pipeline)
    plugged.__class__ = importlib.import_module("fewstep.pipelines.speed_up").speed_up(type(pipeline))
    plugged.register_modules(**{SPEED_UP: adapter})
    return plugged
