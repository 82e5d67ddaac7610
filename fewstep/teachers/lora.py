"""A teacher that is a base model and a LoRA of the user's: loaded by diffusers, and fused into the teacher's weights.

Fused, it needs no special case anywhere: the recording, every role and a whole student see one stock network. A student
that is a LoRA was trained on top of it, and would be wrong on the bare base; so its exported file holds both, which for
low-rank products is one of the sum of their ranks (:mod:`fewstep.export.lora`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from peft.tuners.lora import Conv2d, Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.errors import UserError, first_line, one_line
from fewstep.recording.watch.quiet import only_errors
from fewstep.teachers.names import called

_ADAPTER = "teacher"
#: The name that diffusers gives to a LoRA's file.
_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class FusedLora:
    """What was fused into a teacher.

    Attributes:
        name: what a card calls it: a hub id, or the name of its file or folder.
        factors: component -> layer -> (A, B), of shapes (rank, in, ...) and (out, rank, ...): its weight grew by B A.
        apart: why it cannot be a part of a LoRA student's file; None: it can.
        file: that it was read from.
    """

    name: str
    factors: dict[str, dict[str, tuple[Tensor, Tensor]]]
    apart: str | None
    file: Path

    @property
    def in_text(self) -> bool:
        """Whether it changes a text encoder."""
        return any(component.startswith("text_encoder") for component in self.factors)

    def without(self, component: str, network: nn.Module) -> nn.Module:
        """A copy of a component as it was before, to rounding, where nothing is ``apart``; ``network`` stays."""
        found = copy.deepcopy(network)
        for path, (a, b) in self.factors.get(component, {}).items():
            weight = found.get_parameter(f"{path}.weight").data
            weight.sub_((b.flatten(1) @ a.flatten(1)).view_as(weight).to(weight))
        return found


def fuse_teacher_lora(pipeline: DiffusionPipeline, name: str) -> FusedLora:
    """Load a LoRA into a pipeline and fuse it, in place.

    Args:
        pipeline: of the base model.
        name: a safetensors file, a folder that holds one, or a hub id.

    Raises:
        UserError: there is no such file, or not every part of it belongs to this pipeline.
    """
    file = lora_file(name)
    keys = _keys(name, file)
    _load(pipeline, name, file, keys)
    modules: dict[str, Any] = {n: part for n, part in pipeline.components.items() if isinstance(part, nn.Module)}
    layers = {n: {p: m for p, m in module.named_modules() if _adapted(m)} for n, module in modules.items()}
    layers = {n: found for n, found in layers.items() if found}
    loaded, held = sum(len(found) for found in layers.values()), _products(pipeline, file, keys)
    if loaded != held:
        _unload(pipeline, layers)
        raise UserError(
            f"--teacher_lora {name} is not for this teacher: it holds {held} layers, and {loaded} of them belong here"
        )
    adapters = {n: {p: m for p, m in found.items() if isinstance(m, LoraLayer)} for n, found in layers.items()}
    fused = FusedLora(
        name=called(Path(name)) if Path(name).exists() else name,
        factors={n: {p: _factors(m) for p, m in found.items() if _plain(m)} for n, found in adapters.items()},
        apart=_why_apart(layers),
        file=file,
    )
    if hasattr(pipeline, "fuse_lora"):
        pipeline.fuse_lora(components=list(layers), adapter_names=[_ADAPTER])
    else:
        for component in layers:
            modules[component].fuse_lora(adapter_names=[_ADAPTER])
    _unload(pipeline, layers)
    return fused


def with_own_weights(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A copy of a pipeline object whose networks, but for the decoder, are copies: what is fused there stays there."""
    other = copy.copy(pipeline)
    own = {n: copy.deepcopy(m) for n, m in pipeline.components.items() if isinstance(m, nn.Module) and n != "vae"}
    other.register_modules(**own)
    return other


def lora_file(name: str) -> Path:
    """The file of a teacher's LoRA, fetched from the hub where it lies there.

    Raises:
        UserError: there is none, or not one alone.
    """
    path = Path(name)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"--teacher_lora {name} is no safetensors file, and others are not opened")
        return path
    if path.is_dir():
        held = sorted(file.name for file in path.glob("*.safetensors"))
        return _only(name, held, lambda chosen: path / chosen)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"--teacher_lora {name} does not exist")
    from huggingface_hub import hf_hub_download, list_repo_files

    try:
        files = [file for file in list_repo_files(name) if file.endswith(".safetensors")]
        return _only(name, files, lambda chosen: Path(hf_hub_download(name, chosen)))
    except UserError:
        raise
    except Exception as error:  # the hub's library has errors of its own, and those of the network below it
        raise UserError(
            f"there is no folder --teacher_lora {name}, nor can the hub give it: {first_line(error)}"
        ) from error


def _only(name: str, files: list[str], get: Callable[[str], Path]) -> Path:
    """The file of diffusers' own name, else the only one."""
    if _FILE in files:
        return get(_FILE)
    if len(files) != 1:
        has = "no safetensors file" if not files else f"{len(files)} of them"
        raise UserError(f"--teacher_lora {name} holds {has}; name the file itself")
    return get(files[0])


def _keys(name: str, file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as opened:
            keys, metadata = list(opened.keys()), opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"--teacher_lora {name} cannot be read: {error}") from error
    if "fewstep" in metadata:
        raise UserError(f"--teacher_lora {name} is a few-step student already; give the LoRA that its teacher had")
    if any("dora_scale" in key for key in keys):  # diffusers drops it, and what is left is another model
        raise UserError(f"--teacher_lora {name} is a DoRA of a kind that diffusers does not load")
    return keys


def _load(pipeline: DiffusionPipeline, name: str, file: Path, keys: list[str]) -> None:
    """By diffusers' own methods; what it only warns of is counted by the caller."""
    adaptable = [n for n, part in pipeline.components.items() if hasattr(part, "load_lora_adapter")]
    if not adaptable:
        raise UserError(f"--teacher_lora: diffusers loads no LoRA into the networks of a {type(pipeline).__name__}")
    words = {"weight_name": file.name, "adapter_name": _ADAPTER, "use_safetensors": True}
    try:
        with only_errors():
            if hasattr(pipeline, "load_lora_weights"):
                pipeline.load_lora_weights(str(file.parent), **words)
            else:
                prefix = adaptable[0] if any(key.startswith(f"{adaptable[0]}.") for key in keys) else None
                pipeline.components[adaptable[0]].load_lora_adapter(str(file.parent), prefix=prefix, **words)
    except Exception as error:  # each format of LoRA files has a converter with exceptions of its own
        _unload(pipeline, adaptable)
        raise UserError(f"--teacher_lora {name} is not for this teacher: {one_line(error)[:200]}") from error


def _products(pipeline: DiffusionPipeline, file: Path, keys: list[str]) -> int:
    """How many layers a file changes, in diffusers' own names: other formats hold several of its layers as one."""
    state: Any = dict.fromkeys(keys)
    if hasattr(pipeline, "lora_state_dict"):
        with only_errors():
            state = pipeline.lora_state_dict(str(file.parent), weight_name=file.name, use_safetensors=True)
        state = state[0] if isinstance(state, tuple) else state
    return max(_count(list(state)), _count(keys))


def _count(keys: list[str]) -> int:
    """One for each product, named by its second factor; Kronecker products by their first."""
    return sum(
        bool(re.search(r"lora_B(\.\w+)?\.weight$|lora_up\.weight$|\.up\.weight$|lokr_w1(_b)?$", key)) for key in keys
    )


def _adapted(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer) and _ADAPTER in getattr(module, "scaling", {})


def _plain(layer: LoraLayer) -> bool:
    """Whether the layer's weight grows by a product and by nothing else."""
    known = isinstance(layer, Linear | Conv2d) and _ADAPTER in layer.lora_A
    return known and not layer.use_dora.get(_ADAPTER, False) and layer.lora_B[_ADAPTER].bias is None


def _factors(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    a, b = (getattr(layer, name)[_ADAPTER].weight.detach() for name in ("lora_A", "lora_B"))
    return a.clone(), b * layer.scaling[_ADAPTER]


def _why_apart(layers: dict[str, dict[str, nn.Module]]) -> str | None:
    for component, found in layers.items():
        if component.startswith("text_encoder"):
            return f"it changes the {component}"
        if not all(isinstance(layer, LoraLayer) and _plain(layer) for layer in found.values()):
            return "it is more than low-rank products"
    return None


def _unload(pipeline: DiffusionPipeline, components: Iterable[str]) -> None:
    if hasattr(pipeline, "unload_lora_weights"):
        pipeline.unload_lora_weights()
        return
    for component in components:
        pipeline.components[component].unload_lora()
