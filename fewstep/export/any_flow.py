"""A student of two times as diffusers' own pipeline of two times, which loads without code of ours (Wan).

``AnyFlowPipeline`` with ``AnyFlowTransformer3DModel``: the layout of its samples is (B, F, C, H, W), and its network is
told both times. What is known of the teacher's pipeline is carried over; the walk at export proves it.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import diffusers
import torch
from torch import nn

from fewstep.diffusion.schedule import FlowSchedule
from fewstep.export.errors import ExportError
from fewstep.export.walk.plan import StudentPlan
from fewstep.networks.flow_map import SECOND_TIME, FlowMapDenoiser
from fewstep.networks.roles import Role
from fewstep.networks.two_time_form import GATE, DeltaTime, has_two_time_form, is_two_time_form, to_two_time_form
from fewstep.recording import Recording
from fewstep.recording.call.invocation import read_invocation
from fewstep.recording.loop.experts import Expert
from fewstep.recording.rules.rules import TimeRule

#: In float32, relative to the largest entry.
_EQUAL = 1e-5


def takes_two_times(recording: Recording, plan: StudentPlan | None = None) -> bool:
    """Whether a student of two times can be diffusers' own pipeline of that kind.

    Args:
        recording: of the teacher.
        plan: of the student; None for one that moves by such a pipeline's scheduler.
    """
    pipeline: Any = recording.pipeline
    return (
        type(pipeline).__name__ == "WanPipeline"
        and hasattr(diffusers, "AnyFlowPipeline")
        and len(recording.experts) == 1
        and not pipeline.config.get("expand_timesteps")
        and isinstance(recording.schedule, FlowSchedule)
        and recording.schedule.timestep_scale == 1000
        and has_two_time_form(recording.network)
        and (plan is None or type(plan.scheduler).__name__ == "FlowMapEulerDiscreteScheduler")
    )


def any_flow_recording(recording: Recording, second_time: DeltaTime) -> Recording:
    """The recording of that pipeline, with the teacher's weights.

    Args:
        recording: of the teacher; it and its pipeline stay as they are.
        second_time: of the student.
    """
    network = to_two_time_form(recording.network, second_time)
    teacher: Any = recording.pipeline
    parts = {name: getattr(teacher, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    pipeline = diffusers.AnyFlowPipeline(transformer=network, **parts)
    pipeline.register_to_config(_name_or_path=teacher.config.get("_name_or_path"))
    pipeline.set_progress_bar_config(**getattr(teacher, "_progress_bar_config", {}))
    taken = inspect.signature(type(pipeline).__call__).parameters
    call = {name: value for name, value in recording.call.items() if name in taken}
    invocation = read_invocation(pipeline, {"prompt": recording.invocation.item, **call})
    channels, frames, *size = recording.sample_shape
    shape = (frames, channels, *size)
    recipe = recording.recipe
    times = tuple(
        TimeRule(argument, source, "float64", (), "float64", shape=(frames,))
        for argument, source in (("timestep", "timestep"), ("r_timestep", "next"))
    )
    return replace(
        recording,
        pipeline=pipeline,
        network=network,
        invocation=invocation,
        recipe=replace(
            recipe,
            sample_shape=shape,
            sample=replace(recipe.sample, permutation=(), shape=shape),
            times=times,
            output=replace(recipe.output, permutation=(), shape=shape),
        ),
        experts=(Expert(recording.component, network, recording.experts[0].lowest),),
    )


def any_flow_network(role: Role, teacher: Recording, recording: Recording) -> nn.Module:
    """A role's weights as the network of that pipeline, which answers as the role does.

    Args:
        role: of two times.
        teacher: what the role was recorded as.
        recording: of the pipeline, see :func:`any_flow_recording`.

    Raises:
        ExportError: it does not.
    """
    second_time, ours = role.added[SECOND_TIME], role.single.denoiser
    assert isinstance(second_time, DeltaTime) and isinstance(ours, FlowMapDenoiser)  # as the recording is of its form
    network = to_two_time_form(role.stock_network(), second_time)
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *teacher.sample_shape, generator=generator).to(device)
    t, r = (torch.tensor(times, dtype=torch.float64, device=device) for times in ((0.9, 0.4), (0.3, 0.4)))
    told = teacher.condition([teacher.invocation.item] * 2).to(device=device)
    with torch.no_grad():
        said = ours.raw(x, t, told, r)
        timesteps = [teacher.schedule.timestep(time) for time in (t, r)]
        stock = recording.recipe.call(network, x.transpose(1, 2), timesteps[0], told, next_timestep=timesteps[1])
    apart = float((stock.transpose(1, 2).double() - said.double()).abs().max() / said.double().abs().max())
    if not apart <= (_EQUAL if said.dtype == torch.float32 and device.type == "cpu" else 5e-2):
        raise ExportError(f"the student as diffusers' network of two times answers otherwise, by {apart:.1g} of 1")
    return network


def about_gate(pipeline: Any) -> dict[str, float]:
    """What ``fewstep.json`` says of a gate: a word of the configuration that no weight would contradict."""
    network = getattr(pipeline, "transformer", None)
    return {"gate_value": GATE} if network is not None and is_two_time_form(network) else {}


def refuse_other_gate(pipeline: Any, about: dict[str, Any]) -> None:
    """Raise ``ExportError`` for a loaded student whose configuration has another gate than its weights are made for."""
    if (expected := about.get("gate_value")) is None:
        return
    config = pipeline.transformer.config
    if config.gate_value != expected or config.deltatime_type != "t-r":
        raise ExportError(
            f"this student's transformer is configured with gate_value {config.gate_value} of "
            f"{config.deltatime_type}, and its weights are made for {expected} of t-r: put that back into "
            "transformer/config.json"
        )
