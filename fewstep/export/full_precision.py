"""A run on a quantised teacher: how that is loaded, what it cannot do, and its student in full precision."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fewstep.config.run import RunConfig
from fewstep.errors import UserError
from fewstep.export import why_no_lora
from fewstep.networks.roles import Role
from fewstep.recording import Recording
from fewstep.teachers.loading import load_teacher
from fewstep.teachers.quantization import is_quantized


def load_run_teacher(
    config: RunConfig, parts: dict[str, Any] | None = None, *, quantized: bool = True
) -> DiffusionPipeline:
    """The teacher of a run.

    A quantised one is loaded in the dtype that it computes in: text encoders in float32 would take more than is saved.

    Args:
        config: of the run.
        parts: of its pipeline that are there already.
        quantized: as the run says; else its denoisers are loaded in full precision.
    """
    half = config.quantization is not None and config.mixed_precision == "bf16"
    return load_teacher(
        config.teacher,
        config.trust_remote_code,
        dtype=torch.bfloat16 if half else torch.float32,
        quantization=config.quantization if quantized else None,
        **(parts or {}),
    )


def refuse_quantized(config: RunConfig, recording: Recording, loaded: bool) -> None:
    """Refuse what a quantised teacher cannot do, and a teacher that was to be quantised and is not.

    Args:
        config: of the run.
        recording: of the teacher.
        loaded: whether this run loaded it, and so can load it once more.

    Raises:
        UserError: one of these.
    """
    quantized = {name: is_quantized(network) for name, network in recording.networks.items()}
    if config.quantization is not None and not all(quantized.values()):
        name = next(name for name, whether in quantized.items() if not whether)
        why = "has no layer that can be quantised" if loaded else "is loaded already"
        raise UserError(f"--quantization {config.quantization}: the {name} {why}; leave it out")
    if not any(quantized.values()):
        return
    name = next(name for name, whether in quantized.items() if whether)
    if not config.lora_rank or config.full_critic:
        raise UserError(f"the {name} is quantised, so that only adapters can be trained: give --lora_rank alone")
    whole = config.merge or why_no_lora(recording) is not None
    if whole and config.quantization is None:
        raise UserError(
            f"the {name} is quantised and its weights in full precision are not at hand, so that no whole pipeline can "
            "be written; give the teacher unquantised, with --quantization"
        )


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
        merged[name] = role.experts[name].stock_network(copy.deepcopy(loaded[id(network)]).to(device))
    return student.on(merged), nn.ModuleDict(merged)
