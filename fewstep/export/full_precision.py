"""The student of a quantised teacher in full precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from fewstep.networks.roles import Role
from fewstep.recording import Recording


def in_full_precision(
    load: Callable[[dict[str, Any]], DiffusionPipeline], teacher: Recording, student: Recording, role: Role
) -> tuple[Recording, nn.ModuleDict]:
    """The recording of a student whose networks are not quantised, and these networks, adapters merged, by component.

    Args:
        load: gives the teacher's pipeline in full precision, when it is told the parts that are there.
        teacher: the recording of the quantised teacher.
        student: that of the student's pipeline, which may hold a teacher's network more than once.
        role: of adapters on the quantised networks.
    """
    others = {name: part for name, part in teacher.pipeline.components.items() if name not in teacher.networks}
    fresh = load(others)
    loaded = {id(network): getattr(fresh, name) for name, network in teacher.networks.items()}
    merged = {}
    for name, network in student.networks.items():
        device = next(network.parameters()).device
        expert: Any = role.experts[name]  # an adapter: it can be merged into another network than its own
        merged[name] = expert.stock_network(copy.deepcopy(loaded[id(network)]).to(device))
    return student.on(merged), nn.ModuleDict(merged)
