"""The recording of a student with an expert for each phase: the teacher's pipeline with as many networks.

A teacher of several networks (Wan 2.2) keeps its pipeline. A pipeline class that has room for a second network (Wan)
takes it. Every other class gets room by ``pipelines/phased.py``, a copy of which is then part of the student.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from fewstep.diffusion.phases import Phase
from fewstep.errors import UserError
from fewstep.recording.loop.experts import Expert
from fewstep.recording.pipeline import find_scheduler

if TYPE_CHECKING:
    from fewstep.export.walk.plan import StudentPlan
    from fewstep.recording import Recording

#: The argument by which stock classes with room for two networks are told where they change, a share of all timesteps.
_BOUNDARY = "boundary_ratio"


def phased_recording(recording: Recording, phases: Sequence[Phase]) -> Recording:
    """The recording as if the pipeline had one network for each phase; they still are the teacher's.

    Args:
        recording: of the teacher; it and its pipeline stay as they are.
        phases: of the student.

    Raises:
        UserError: the teacher's own networks change inside of a phase, or its class is none of diffusers.
    """
    if len(recording.experts) > 1:
        return _of_several(recording, phases)
    if len(phases) == 1:
        return recording
    first = recording.component
    names = (first, *(f"{first}_{k}" for k in range(2, len(phases) + 1)))
    experts = tuple(
        Expert(name, recording.network, _lowest(recording, phase)) for name, phase in zip(names, phases, strict=True)
    )
    stock = type(recording.pipeline)
    if len(names) == 2 and {names[1], _BOUNDARY} <= inspect.signature(stock.__init__).parameters.keys():
        pipeline = copy.copy(recording.pipeline)
        pipeline.register_modules(**{names[1]: recording.network})
        _set_boundary(pipeline, experts[0].lowest)
    else:
        pipeline = _with_room(recording.pipeline, experts)
    return replace(recording, pipeline=pipeline, experts=experts)


def moves_boundary(recording: Recording, student: Recording) -> bool:
    """Whether the student has other networks than the teacher's pipeline, or changes them elsewhere."""
    return [expert.lowest for expert in recording.experts] != [expert.lowest for expert in student.experts]


def phased_plan(plan: StudentPlan, phases: Sequence[Phase]) -> StudentPlan:
    """The plan with those step counts alone that stop where each phase ends: no expert goes further than it learnt.

    Raises:
        UserError: the student's times would follow the size, and leave the phases.
    """
    if plan.dynamic and len(phases) > 1:
        raise UserError("--dynamic_shift keep moves the times by the size, and the phases stay; leave it out")
    starts = [phase.start for phase in phases]
    counts = [
        count
        for count in plan.counts
        if all(any(math.isclose(start, t, abs_tol=1e-6) for t in plan.grids[count]) for start in starts)
    ]
    return replace(plan, counts=tuple(counts), grids={count: plan.grids[count] for count in counts})


def _of_several(recording: Recording, phases: Sequence[Phase]) -> Recording:
    """Each of the teacher's networks must make the steps of one phase."""
    bounds = [expert.lowest for expert in recording.experts[:-1]]
    told = ", ".join(f"{bound:g}" for bound in bounds)
    if len(phases) != len(recording.experts):
        raise UserError(
            f"this teacher has {len(recording.experts)} networks, which change at timestep {told}; give as many phases"
        )
    moved = list(recording.experts)
    for k, (phase, bound) in enumerate(zip(phases, bounds, strict=False)):
        assert phase.anchor is not None  # the last phase alone has none, and the last network no bound
        # The last step before the bound, and where it leads, in the scheduler's own float32 numbers.
        last, arrival = _timestep(recording, phase.last), _timestep(recording, phase.anchor)
        if not arrival <= bound <= last:
            raise UserError(
                f"phase {k + 1} ends at timestep {arrival:g}, and the teacher's networks change at {told}; choose "
                "--phases, --steps or --shift so that they change where a phase ends"
            )
        if arrival == bound:  # the pipeline would ask the noisier network there
            moved[k] = replace(moved[k], lowest=_lowest(recording, phase))
    if moved == list(recording.experts):
        return recording
    if len(moved) != 2 or _BOUNDARY not in recording.pipeline.config:
        raise UserError(
            f"the student's second phase begins at timestep {told}, where the pipeline still calls its first network; "
            "choose another --shift"
        )
    pipeline = copy.copy(recording.pipeline)
    _set_boundary(pipeline, moved[0].lowest)
    return replace(recording, pipeline=pipeline, experts=tuple(moved))


def _with_room(pipeline: Any, experts: Sequence[Expert]) -> Any:
    """A copy of the pipeline, of a class that has room for its networks."""
    stock = type(pipeline)
    if getattr(diffusers, stock.__name__, None) is not stock:
        raise UserError(f"{stock.__name__} is no class of diffusers; a student with phases can be made of those only")
    names = tuple(expert.component for expert in experts)
    other = copy.copy(pipeline)
    other.__class__ = importlib.import_module("fewstep.pipelines.phased").phased(stock, names)
    other.register_modules(**{expert.component: expert.network for expert in experts[1:]})
    other.register_to_config(phase_bounds=[expert.lowest for expert in experts[:-1]])
    return other


def _set_boundary(pipeline: Any, lowest: float) -> None:
    count = getattr(pipeline, find_scheduler(pipeline)).config.num_train_timesteps
    pipeline.register_to_config(**{_BOUNDARY: lowest / count})


def _lowest(recording: Recording, phase: Phase) -> float:
    """The lowest timestep at which a phase's network is called; -inf for the last."""
    return -torch.inf if phase.anchor is None else _timestep(recording, phase.lowest)


def _timestep(recording: Recording, t: float) -> float:
    return recording.schedule.timestep(torch.tensor([t], dtype=torch.float64)).float().item()
