"""What a pipeline consists of: its networks, its scheduler, its decoder; the same pipeline with other parts."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch._subclasses import FakeTensor

from fewstep.recording.errors import RecordingError


def name_of(pipeline: Any) -> str:
    """Where a pipeline was loaded from, a folder or a hub id; of one that was not loaded, its class's name."""
    return str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)


def find_scheduler(pipeline: Any) -> str:
    """The name of the pipeline's scheduler component."""
    found = [n for n, c in pipeline.components.items() if hasattr(c, "step") and hasattr(c, "set_timesteps")]
    if not found:
        raise RecordingError(f"{type(pipeline).__name__} has no scheduler with step and set_timesteps to record")
    return "scheduler" if "scheduler" in found else found[0]


def modules_of(pipeline: Any) -> dict[str, nn.Module]:
    """The pipeline's components that are networks, by name."""
    return {name: c for name, c in pipeline.components.items() if isinstance(c, nn.Module)}


def find_decoder(pipeline: Any) -> str | None:
    """The name of the component that turns latents into images (it has `encode` and `decode`); None: there is none."""
    for name, module in modules_of(pipeline).items():
        if callable(getattr(module, "encode", None)) and callable(getattr(module, "decode", None)):
            return name
    return None


@contextlib.contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """The networks in eval mode: in train mode a label embedding drops labels at random, which no recipe reproduces."""
    modules = [module for network in networks for module in network.modules()]
    modes = [module.training for module in modules]
    if any(modes):
        for network in networks:
            network.eval()
    try:
        yield
    finally:
        for module, training in zip(modules, modes):
            if module.training != training:
                module.training = training


@contextlib.contextmanager
def without_safety_checker(pipeline: Any) -> Iterator[None]:
    """Inside, no picture is blackened, by pipelines whose checker may be absent: those that have a method to run it."""
    checker = getattr(pipeline, "safety_checker", None)
    if checker is None or not hasattr(pipeline, "run_safety_checker"):
        yield
        return
    # Past the pipeline's own way, which would take the checker out of its configuration for good.
    object.__setattr__(pipeline, "safety_checker", None)
    try:
        yield
    finally:
        object.__setattr__(pipeline, "safety_checker", checker)


def with_parts(pipeline: Any, **parts: Any) -> Any:
    """A copy of the pipeline object with other components; all else is shared, the pipeline itself stays as it is."""
    other = copy.copy(pipeline)
    other.register_modules(**parts)
    return other


def is_quantized(network: nn.Module) -> bool:
    """Whether any layer of a network holds other than ordinary weights."""
    return any(is_quantized_layer(module) for module in network.modules())


def is_quantized_layer(layer: nn.Module) -> bool:
    """Whether one of a layer's own weights is no ordinary one, or the layer stands for such a one in a plan."""
    stands_for_one = getattr(layer, "stands_for_quantized", False)
    return stands_for_one or any(not is_plain(parameter) for parameter in layer.parameters(recurse=False))


def is_plain(parameter: nn.Parameter) -> bool:
    """Whether a parameter is an ordinary one: its data are its numbers, which may be read, moved and cast."""
    return type(parameter) is nn.Parameter or isinstance(parameter, FakeTensor)
