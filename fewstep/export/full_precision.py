"""A run on a quantised teacher: how that is loaded, what it cannot do, and its student in full precision."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fewstep.config.run import RunConfig
from fewstep.networks.roles import Role
from fewstep.recording import Recording
from fewstep.teachers.loading import load_run_teacher


def in_full_precision(
    config: RunConfig, teacher: Recording, student: Recording, role: Role
) -> tuple[Recording, nn.ModuleDict]:
    """The recording of a student whose networks are not quantised, and these networks, adapters merged, by component.

    Args:
        config: of the run.
        teacher: the recording of the quantised teacher.
        student: that of the student's pipeline, which may hold a teacher's network more than once.
        role: of adapters on the quantised networks.
    """
    others = {name: part for name, part in teacher.pipeline.components.items() if name not in teacher.networks}
    fresh = load_run_teacher(config, others, quantized=False)
    loaded = {id(network): getattr(fresh, name) for name, network in teacher.networks.items()}
    merged = {}
    for name, network in student.networks.items():
        device = next(network.parameters()).device
        expert: Any = role.experts[name]  # an adapter: it can be merged into another network than its own
        merged[name] = expert.stock_network(copy.deepcopy(loaded[id(network)]).to(device))
    return student.on(merged), nn.ModuleDict(merged)
