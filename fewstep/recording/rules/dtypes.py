"""The dtype of a network's weights, which every call of it asks for."""

from __future__ import annotations

import weakref

import torch
from torch import nn

#: By network: the module that holds the largest weight of the network's dtype, that weight's name there, and the dtype.
_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[nn.Module], str, torch.dtype]] = (
    weakref.WeakKeyDictionary()
)


def network_dtype(network: nn.Module) -> torch.dtype:
    """The dtype of most of the network's own floating-point weights: some networks keep a few in float32.

    A network's weights are counted once. What was found holds as long as its largest weight has that dtype, which no
    cast of the network leaves as it is.
    """
    if network in _FOUND:
        holder, name, dtype = _FOUND[network]
        module = holder()
        weight = None if module is None else module._parameters.get(name)
        if weight is not None and weight.dtype == dtype:
            return dtype
    sizes: dict[torch.dtype, int] = {}
    largest: dict[torch.dtype, nn.Parameter] = {}
    holders: dict[nn.Parameter, tuple[nn.Module, str]] = {}
    for path, module in network.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if not weight.is_floating_point() or weight in holders or ".lora_" in f"{path}.{name}":
                continue
            holders[weight] = module, name
            dtype = weight.dtype
            sizes[dtype] = sizes.get(dtype, 0) + weight.numel()
            largest[dtype] = max(weight, largest.get(dtype, weight), key=lambda one: one.numel())
    if not sizes:
        return torch.float32
    dtype = max(sizes, key=lambda dtype: sizes[dtype])
    module, name = holders[largest[dtype]]
    _FOUND[network] = weakref.ref(module), name, dtype
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
