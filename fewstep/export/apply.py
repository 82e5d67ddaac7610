"""Putting a LoRA student onto a pipeline of its base model: the adapter, the scheduler, and the call filled in."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn

from fewstep.errors import one_line
from fewstep.export.about import fetched, read_about, refuse_adapters, student_class
from fewstep.export.errors import ExportError
from fewstep.export.related.record import relative_of
from fewstep.export.student_adapter import (
    ADAPTER,
    activate,
    active_adapters,
    fuse_adapter,
    is_fused,
    remove_adapter,
    why_not_beside,
    why_not_fused,
    why_off,
)
from fewstep.reading import parse_json
from fewstep.recording.pipeline import find_scheduler, is_quantized
from fewstep.recording.watch.quiet import only_errors

#: The name that diffusers looks for.
LORA_FILE = "pytorch_lora_weights.safetensors"
#: Of what was trained, as much may be lost to the weights' rounding before a user is told.
_LOST = 0.1


def apply(pipeline: DiffusionPipeline, lora: str | Path, *, fuse: bool = False, **fetching: Any) -> DiffusionPipeline:
    """Make a pipeline of the base model the student: its call needs a prompt or labels and nothing else.

    The student's adapter is named ``"student"``; adapters that are active stay so, each as strongly as before.

    Args:
        pipeline: of the base model, as stock diffusers loads it; it is changed in place.
        lora: a ``student_lora`` folder that fewstep wrote, or its hub id.
        fuse: add the adapter to the weights for good, which ``save_pretrained`` then writes like any others.
        **fetching: huggingface_hub's download arguments (revision, token, ...) for a hub id.

    Returns:
        The same object, now of a subclass of its class. Arguments that are given win over ``fewstep.json``.

    Raises:
        ExportError: not a LoRA student, one of another model, or ``fuse`` for weights that nothing can be added to; the
            pipeline is then as it was.
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
        if (reason := why_not_beside(network)) is not None:
            raise ExportError(f"the {component} {reason}")
        if fuse and (reason := why_not_fused(network)) is not None:
            raise ExportError(f"no student can be fused into this {component}: {reason}; apply it without fuse")
        weights = fetched(lora, file, **fetching)
        if (reason := _misfit(network, about["component"], weights)) is not None:
            raise ExportError(f"{lora} is for {base} and does not fit this {component}: {reason}")
    relative_of(type(pipeline), about)  # which refuses a class under which the student is wrong
    fetched(lora, "scheduler/scheduler_config.json", **fetching)
    _ship_or_leave(pipeline, about, weights.parent, str(lora))
    if fuse:
        _fuse(pipeline, about)
    else:
        pipeline.__class__ = adapter_class(type(pipeline), about)
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
    # diffusers warns that the file holds nothing for the text encoders.
    with only_errors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
        for name, file in lora_files(about).items():
            network: Any = getattr(pipeline, name)
            others = active_adapters(network)
            words = {"weight_name": file, "adapter_name": ADAPTER}
            # Some pipelines' own loaders look for weights by names that quantised layers do not have.
            if name == component and hasattr(pipeline, "load_lora_weights") and not is_quantized(network):
                pipeline.load_lora_weights(str(folder), **words)
            else:
                network.load_lora_adapter(str(folder), prefix=component, _pipeline=pipeline, **words)
            activate(network, [*others, ADAPTER])
    named = about.get("scheduler", "")
    kind: Any = getattr(diffusers, named, None)
    if not issubclass(kind if isinstance(kind, type) else object, diffusers.SchedulerMixin):
        raise ValueError(f"{named!r} is no scheduler of this diffusers")
    stock = kind.from_pretrained(str(folder), subfolder="scheduler")
    pipeline.register_modules(**{find_scheduler(pipeline): stock})


def _ship_or_leave(pipeline: DiffusionPipeline, about: Mapping[str, Any], folder: Path, name: str) -> None:
    networks: list[Any] = [getattr(pipeline, component) for component in lora_files(about)]
    before = [active_adapters(network) for network in networks]
    try:
        ship(pipeline, about, folder)
    except Exception as error:  # each pipeline's loader has exceptions of its own
        for network, others in zip(networks, before, strict=True):
            remove_adapter(network)
            if others:
                activate(network, others)
        said = f"{type(error).__name__}: {one_line(error)}"[:200]
        raise ExportError(f"{name} cannot be loaded into this {type(pipeline).__name__} ({said})") from error


def _fuse(pipeline: DiffusionPipeline, about: Mapping[str, Any]) -> None:
    for component in lora_files(about):
        network = getattr(pipeline, component)
        lost = fuse_adapter(network)
        if lost > _LOST:
            kept = str(next(network.parameters()).dtype).removeprefix("torch.")
            warnings.warn(
                f"{lost:.0%} of the student's change of the {component} is lost to the rounding of its {kept} weights; "
                "fuse it in float32, or apply it without fuse",
                stacklevel=3,
            )
    pipeline.__class__ = _whole(type(pipeline), about)


def _whole(stock: type[DiffusionPipeline], about: Mapping[str, Any]) -> type[DiffusionPipeline]:
    """The class of a student whose weights hold what was trained."""
    return student_class(stock, {name: value for name, value in about.items() if name != "lora"})


def adapter_class(stock: type[DiffusionPipeline], about: dict[str, Any]) -> type[DiffusionPipeline]:
    """The class of a student that is an adapter: it says when that is off, and writes nothing that does not load."""
    components = list(lora_files(about))

    def warned_of(pipeline: DiffusionPipeline) -> list[str]:
        found = [(component, why_off(getattr(pipeline, component))) for component in components]
        return [
            f"this is not the student: its adapter of the {component} {reason}; "
            f'set_adapters(["{ADAPTER}", ...]) names all that shall act'
            for component, reason in found
            if reason is not None
        ]

    filled = student_class(stock, about, warned_of=warned_of)

    def save_pretrained(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> None:
        refuse_adapters(self)
        raise ExportError("the student's adapter is not in this pipeline any more, and what is left is the base model")

    def fuse_lora(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> None:
        for component in components:
            if (reason := why_not_fused(getattr(self, component))) is not None:
                raise ExportError(f"no student can be fused into this {component}: {reason}")
        stock.fuse_lora(self, *args, **kwargs)

    def unload_lora_weights(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> None:
        kept = all(is_fused(getattr(self, component)) for component in components)
        stock.unload_lora_weights(self, *args, **kwargs)
        if kept:
            self.__class__ = _whole(stock, about)

    body: dict[str, Any] = {}
    for method in (save_pretrained, fuse_lora, unload_lora_weights):
        if hasattr(stock, method.__name__):
            body[method.__name__] = functools.wraps(getattr(stock, method.__name__))(method)
    body |= {"__doc__": stock.__doc__, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (filled,), body)


def _misfit(network: nn.Module, component: str, weights: Path) -> str | None:
    """Why the file cannot be loaded into the network, None where it can."""
    modules: dict[str, Any] = dict(network.named_modules())
    try:
        with safe_open(weights, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
            adapter = parse_json((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        return f"{weights.name} cannot be read ({one_line(error)})"
    for key, shape in shapes.items():
        path, _, factor = key.removeprefix(f"{component}.").removesuffix(".weight").rpartition(".")
        layer = modules.get(path)
        if layer is None or getattr(layer, "weight", None) is None:
            return f"it has no {path}"
        if len(shape) < 2:
            return f"{weights.name} is damaged: its {key} has the shape {list(shape)}"
        # A quantised weight has a shape of its own.
        features = "in_features" if factor == "lora_A" else "out_features"
        wanted = getattr(layer, features, layer.weight.shape[1 if factor == "lora_A" else 0])
        if (shape[1] if factor == "lora_A" else shape[0]) != wanted:
            return f"{path} is {tuple(layer.weight.shape)} here"
    # diffusers would make a layer of what the adapter is said to have, and leave it as it starts.
    targets = adapter.get(f"{component}.target_modules", ()) if isinstance(adapter, dict) else ()
    for path in targets if isinstance(targets, list) else ():
        for factor in ("lora_A", "lora_B"):
            if f"{component}.{path}.{factor}.weight" not in shapes:
                return f"{weights.name} is damaged: it lacks the {factor} of {path}"
    return None
