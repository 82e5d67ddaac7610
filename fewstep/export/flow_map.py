"""The recording of a student of two times: the teacher's pipeline, of a class that tells its network the second one.

No stock pipeline does, so a copy of ``pipelines/flow_map.py`` is part of every such student.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import diffusers
from torch import nn

from fewstep.errors import UserError
from fewstep.networks.flow_map import SECOND_TIME, FlowMapRecipe
from fewstep.networks.speed_up import SPEED_UP
from fewstep.recording.pipeline import is_quantized

if TYPE_CHECKING:
    from fewstep.networks.roles import Role
    from fewstep.recording import Recording


def flow_map_recording(recording: Recording, second_time: nn.Module) -> Recording:
    """The recording as if the pipeline told its network where every step ends.

    Args:
        recording: of the teacher; it and its pipeline stay as they are.
        second_time: of the student, see :func:`fewstep.networks.second_time.attach_second_time`.

    """
    stock = type(recording.pipeline)
    pipeline = copy.copy(recording.pipeline)
    pipeline.__class__ = importlib.import_module("fewstep.pipelines.flow_map").flow_map(stock)
    pipeline.register_modules(**{SECOND_TIME: second_time})
    recipe: Any = FlowMapRecipe(recording.recipe, recording.schedule, second_time)  # all that is asked of a Recipe
    return replace(recording, pipeline=pipeline, recipe=recipe)


def refuse_no_flow_map(recording: Recording) -> None:
    """Raise ``UserError`` for a teacher of no class of diffusers, of several networks, or a quantised one.

    Quantised layers have no forward derivative, and no LoRA holds a second time.
    """
    stock = type(recording.pipeline)
    if is_quantized(recording.network):
        raise UserError(f"the {recording.component} is quantised; a student of two times needs it in full precision")
    if len(recording.experts) > 1:
        raise UserError(
            f"{stock.__name__} has {len(recording.experts)} networks that share the time, and a student of two times "
            "is one; take dmd2 or phased_dmd"
        )
    if getattr(diffusers, stock.__name__, None) is not stock:
        raise UserError(f"{stock.__name__} is no class of diffusers; a student of two times can be made of those only")


def whole_network(role: Role) -> nn.Module:
    """What a role's pipeline is made of: its stock network, and its second time or its adapter where it has one."""
    network = role.stock_network()
    for name in (SECOND_TIME, SPEED_UP):
        if name in role.added:
            added: Any = role.added[name]  # of a class that lies in a file of pipelines/
            return nn.ModuleDict({added.config.network: network, name: added})
    return network
