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

from fewstep.errors import UserError
from fewstep.recording.pipeline import is_quantized
from fewstep.teachers.source import Source


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


#: Every way that ``--quantization`` knows, by name: those of :data:`fewstep.config.run.QUANTIZATIONS`.
QUANTIZATIONS = {
    "bitsandbytes_4bit": Quantization(4, "bitsandbytes", "bitsandbytes", _bitsandbytes_4bit),
    "bitsandbytes_8bit": Quantization(8, "bitsandbytes", "bitsandbytes", _bitsandbytes_8bit),
    "torchao_int8": Quantization(8, "torchao", "torchao", _torchao_int8),
    "quanto_int8": Quantization(8, "optimum.quanto", "optimum-quanto", _quanto_int8),
    "quanto_int4": Quantization(4, "optimum.quanto", "optimum-quanto", _quanto_int4),
}


def pipeline_quantization(name: str, teacher: Source, dtype: torch.dtype) -> PipelineQuantizationConfig:
    """What ``DiffusionPipeline.from_pretrained`` is told so that a teacher's denoisers are quantised.

    Args:
        name: of :data:`QUANTIZATIONS`.
        teacher: its files.
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
    networks = denoiser_classes(teacher.index())
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


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package around it
        return False


def _device_map(network: nn.Module) -> dict[str, Any]:
    return getattr(network, "hf_device_map", None) or {}
