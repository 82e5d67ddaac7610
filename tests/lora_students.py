"""LoRA students of tiny teachers whose adapter does something, and what they are compared with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from toys import adapter_role

from fewstep.export import export_lora, plan_student
from fewstep.networks.adapters import AdapterRole, Backbone, attention_linears
from fewstep.recording import Recording
from fewstep.recording.pipeline import with_parts


def export(
    recording: Recording,
    out: Path,
    steps: int = 2,
    rank: int = 4,
    alpha: float = 8,
    renoise: str = "auto",
    **more: Any,
) -> tuple[AdapterRole, Path]:
    """A LoRA whose adapter does something, trained with alpha apart from the rank."""
    role = adapter_role("student", Backbone(recording.network, rank, alpha), recording)
    more = {"method": "dmd2", "base_model": "example/teacher", **more}
    return role, export_lora(recording, role, plan_student(recording, steps, renoise=renoise), out, **more)


def fresh(recording: Recording) -> Any:
    """The base model as a user loads it."""
    network = type(recording.network).from_config(recording.network.config)
    network.load_state_dict(recording.network.state_dict())
    parts = recording.pipeline.components
    copies = {name: copy.deepcopy(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    return with_parts(recording.pipeline, **{**copies, recording.component: network.eval()})


def answers(recording: Recording, network: Any) -> Tensor:
    """What a network says of two samples."""
    x = torch.randn(2, *recording.sample_shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        timestep = recording.schedule.timestep(t)
        return recording.recipe.call(network, x, timestep, recording.condition(prompts=["a", "b"]))


def picture(pipeline: Any, **call: Any) -> np.ndarray:
    """What a pipeline makes of a seed, as numbers in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    output = pipeline(**call, output_type="np", generator=torch.Generator().manual_seed(0))
    return np.asarray(output.frames if hasattr(output, "frames") else output.images)


def write_style(recording: Recording, path: Path, rank: int = 2) -> Path:
    """A LoRA of somebody else's, in diffusers' names, on every second layer that a student adapts."""
    generator = torch.Generator().manual_seed(7)
    layers = attention_linears(recording.network)[::2]
    state = {}
    for layer in layers:
        weight = recording.network.get_submodule(layer).weight
        shapes = {"lora_A": (rank, weight.shape[1]), "lora_B": (weight.shape[0], rank)}
        for factor, shape in shapes.items():
            name = f"{recording.component}.{layer}.{factor}.weight"
            state[name] = torch.randn(*shape, generator=generator) / 4
    save_file(state, path)
    return path
