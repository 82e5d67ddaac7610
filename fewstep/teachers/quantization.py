"""A frozen network in 8 or 4 bits, by diffusers' own quantisation, while a teacher is loaded.

Adapters are trained beside such a network and never added to it: a sum could not be rounded back without changing what
was trained. A whole student is its adapter on the weights in full precision, which are loaded once more for that.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from accelerate.hooks import remove_hook_from_submodules
from diffusers import DiffusionPipeline, ModelMixin, PipelineQuantizationConfig
from torch import nn
from torch._subclasses import FakeTensor

from fewstep.errors import UserError


@dataclass(frozen=True)
class Quantization:
    """One way to quantise.

    Attributes:
        bits: of a linear layer's weight.
        module: the library's, to import.
        package: the library's, to install.
        make: gives diffusers' configuration for networks that compute in a dtype.
    """

    bits: int
    module: str
    package: str
    make: Callable[[torch.dtype], Any]


def _bitsandbytes_4bit(dtype: torch.dtype) -> Any:
    return diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _bitsandbytes_8bit(dtype: torch.dtype) -> Any:
    return diffusers.BitsAndBytesConfig(load_in_8bit=True)


def _torchao_int8(dtype: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return diffusers.TorchAoConfig(Int8WeightOnlyConfig())


def _quanto_int8(dtype: torch.dtype) -> Any:
    return diffusers.QuantoConfig(weights_dtype="int8")


def _quanto_int4(dtype: torch.dtype) -> Any:
    return diffusers.QuantoConfig(weights_dtype="int4")


#: Every way that ``--quantization`` knows, by name.
QUANTIZATIONS = {
    "bitsandbytes_4bit": Quantization(4, "bitsandbytes", "bitsandbytes", _bitsandbytes_4bit),
    "bitsandbytes_8bit": Quantization(8, "bitsandbytes", "bitsandbytes", _bitsandbytes_8bit),
    "torchao_int8": Quantization(8, "torchao", "torchao", _torchao_int8),
    "quanto_int8": Quantization(8, "optimum.quanto", "optimum-quanto", _quanto_int8),
    "quanto_int4": Quantization(4, "optimum.quanto", "optimum-quanto", _quanto_int4),
}


def pipeline_quantization(name: str, teacher: str, dtype: torch.dtype) -> PipelineQuantizationConfig:
    """What ``DiffusionPipeline.from_pretrained`` is told so that a teacher's denoisers are quantised.

    Args:
        name: of :data:`QUANTIZATIONS`.
        teacher: folder or hub id.
        dtype: in which the other weights are loaded, and in which the network computes.

    Raises:
        UserError: the library is missing, or does not run here.
    """
    kind = QUANTIZATIONS[name]
    if not _installed(kind.module):
        raise UserError(f"--quantization {name} needs the library {kind.package}: pip install {kind.package}")
    if kind.package == "bitsandbytes" and not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise UserError(f"--quantization {name}: diffusers loads bitsandbytes on a GPU only, and there is none")
    if name == "quanto_int8" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        raise UserError(
            f"--quantization {name} crashes in bfloat16 on a CPU; leave out --mixed_precision or take torchao_int8"
        )
    networks = denoiser_classes(dict(DiffusionPipeline.load_config(teacher)))
    return PipelineQuantizationConfig(quant_mapping={component: kind.make(dtype) for component in networks})


def denoiser_classes(index: dict[str, Any]) -> dict[str, type]:
    """diffusers' own networks of a pipeline by component, of its ``model_index.json``, decoders apart."""
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list | tuple) and len(entry) == 2}
    classes = {name: getattr(diffusers, entry[1] or "", None) for name, entry in entries.items()}
    networks = {name: kind for name, kind in classes.items() if isinstance(kind, type) and issubclass(kind, ModelMixin)}
    return {name: kind for name, kind in networks.items() if not (hasattr(kind, "encode") and hasattr(kind, "decode"))}


def without_hooks(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The same pipeline, without what loading to a single device left on its quantised networks and nobody needs."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and is_quantized(part) and len(set(_device_map(part).values())) <= 1:
            remove_hook_from_submodules(part)
    return pipeline


def is_quantized(network: nn.Module) -> bool:
    """Whether any layer of a network holds other than ordinary weights."""
    return any(is_quantized_layer(module) for module in network.modules())


def is_quantized_layer(layer: nn.Module) -> bool:
    """Whether one of a layer's own weights is no ordinary one, or the layer stands for such a one in a plan."""
    return isinstance(layer, PlannedLinear) or any(
        not is_plain(parameter) for parameter in layer.parameters(recurse=False)
    )


def is_plain(parameter: nn.Parameter) -> bool:
    """Whether a parameter is an ordinary one: its data are its numbers, which may be read, moved and cast."""
    return type(parameter) is nn.Parameter or isinstance(parameter, FakeTensor)


class PlannedLinear(nn.Linear):
    """A linear layer in the sizes of a quantised one, for plans: it has the bytes and no values.

    Args:
        layer: in whose place it stands.
        bits: of a weight.
    """

    _GROUP = 64  # weights that share a float32 scale where there are 4 bits to each; else a row does

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        count, weight = layer.weight.numel(), layer.weight
        packed = torch.empty(count * bits // 8, dtype=torch.uint8, device=weight.device)
        scales = layer.out_features if bits == 8 else -(-count // self._GROUP)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", torch.empty(scales, dtype=torch.int32, device=weight.device))  # no cast halves it
        self.bias = layer.bias

    @property
    def weight(self) -> torch.Tensor:
        """In shape what others ask for, without its memory: one number, seen as many."""
        return self.scale[:1].expand(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Dequantized.apply(x, self.scale, self.weight.shape, self.bias)


class _Dequantized(torch.autograd.Function):
    """A product with a weight that is unpacked for the moment of a pass, forward and backward, and not kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, shape: torch.Size, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(scale)
        ctx.shape = shape
        weight = scale.new_empty(shape, dtype=x.dtype)
        return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (scale,) = ctx.saved_tensors
        return gradient @ scale.new_empty(ctx.shape, dtype=gradient.dtype), None, None, None


def plan_quantized(network: nn.Module, name: str) -> None:
    """Put :class:`PlannedLinear` in the place of every linear layer of a network that has no weights."""
    bits = QUANTIZATIONS[name].bits
    for module in list(network.modules()):
        for child, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                setattr(module, child, PlannedLinear(layer, bits))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package around it
        return False


def _device_map(network: nn.Module) -> dict[str, Any]:
    return getattr(network, "hf_device_map", None) or {}
