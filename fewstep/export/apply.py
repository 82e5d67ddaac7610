"""Putting a LoRA student onto a pipeline of its base model: the adapter, the scheduler, and the call filled in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from torch import nn

from fewstep.export.about import fetched, read_about, student_class
from fewstep.export.errors import ExportError
from fewstep.recording.pipeline import find_scheduler

#: The name that diffusers looks for.
LORA_FILE = "pytorch_lora_weights.safetensors"


def apply(pipeline: DiffusionPipeline, lora: str | Path, **fetching: Any) -> DiffusionPipeline:
    """Make a pipeline of the base model the student: its call needs a prompt or labels and nothing else.

    Args:
        pipeline: of the base model, as stock diffusers loads it; it is changed in place.
        lora: a ``student_lora`` folder that fewstep wrote, or its hub id.
        **fetching: huggingface_hub's download arguments (revision, token, ...) for a hub id.

    Returns:
        The same object, now of a subclass of its class. Arguments that are given win over ``fewstep.json``.

    Raises:
        ExportError: not a LoRA student, or one of another model; the pipeline is then as it was.
    """
    about = read_about(lora, **fetching)
    if "lora" not in about:
        raise ExportError(f"{lora} is a whole pipeline, no LoRA; load it with fewstep.load")
    if hasattr(pipeline, "fewstep"):
        raise ExportError("this pipeline is a student already; load its base model anew")
    base = about["base_model"]
    for name, value in about.get("config", {}).items():
        if (own := pipeline.config.get(name)) != value:
            raise ExportError(f"{lora} is for {base} with {name}={value!r}, and this pipeline has {name}={own!r}")
    for component, file in lora_files(about).items():
        network = pipeline.components.get(component)
        if network is None:
            raise ExportError(f"{lora} is for the {component} of {base}, and {type(pipeline).__name__} has none")
        weights = fetched(lora, file, **fetching)
        if (reason := _misfit(network, about["component"], weights)) is not None:
            raise ExportError(f"{lora} is for {base} and does not fit this {component}: {reason}")
    fetched(lora, "scheduler/scheduler_config.json", **fetching)
    ship(pipeline, about, weights.parent)
    pipeline.__class__ = student_class(type(pipeline), about)
    return pipeline


def lora_files(about: Mapping[str, Any]) -> dict[str, str]:
    """The file of each network's adapter by the network's name in the pipeline, of a student's ``fewstep.json``."""
    return {about["component"]: about["lora"]["file"], **about["lora"].get("further_files", {})}


def ship(pipeline: DiffusionPipeline, about: Mapping[str, Any], folder: Path) -> None:
    """Load the adapters and set the scheduler, as the card tells users of stock diffusers. Nothing is checked.

    Args:
        pipeline: of the base model.
        about: of the student.
        folder: with the adapters and ``scheduler/``.
    """
    component = about["component"]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # diffusers warns that the file holds nothing for the text encoders
    try:
        for name, file in lora_files(about).items():
            if name == component and hasattr(pipeline, "load_lora_weights"):
                pipeline.load_lora_weights(str(folder), weight_name=file)
            else:
                getattr(pipeline, name).load_lora_adapter(str(folder), weight_name=file, prefix=component)
    finally:
        logging.set_verbosity(verbosity)
    stock = getattr(diffusers, about["scheduler"]).from_pretrained(str(folder), subfolder="scheduler")
    pipeline.register_modules(**{find_scheduler(pipeline): stock})


def _misfit(network: nn.Module, component: str, weights: Path) -> str | None:
    """Why the file cannot be loaded into the network, None where it can."""
    modules: dict[str, Any] = dict(network.named_modules())
    try:
        with safe_open(weights, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        return f"{weights.name} cannot be read ({error})"
    for key, shape in shapes.items():
        path, _, factor = key.removeprefix(f"{component}.").removesuffix(".weight").rpartition(".")
        layer = modules.get(path)
        if layer is None:
            return f"it has no {path}"
        # A quantised weight has a shape of its own.
        features = "in_features" if factor == "lora_A" else "out_features"
        wanted = getattr(layer, features, layer.weight.shape[1 if factor == "lora_A" else 0])
        if (shape[1] if factor == "lora_A" else shape[0]) != wanted:
            return f"{path} is {tuple(layer.weight.shape)} here"
    return None
