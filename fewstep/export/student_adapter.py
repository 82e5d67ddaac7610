"""A student's adapter among others on one network: beside them, on or off, or added to the weights for good."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fewstep.recording.pipeline import is_quantized

#: The name under which a student is loaded, for ``set_adapters``.
ADAPTER = "student"


def active_adapters(network: nn.Module) -> list[str]:
    """The adapters that act on a network now, in the order in which they were loaded."""
    found: dict[str, None] = {}
    for layer in _adapted(network):
        if not layer.disable_adapters:
            held = getattr(layer, "scaling", {})
            found |= {name: None for name in layer.active_adapters if name in held}
    return list(found)


def activate(network: Any, adapters: list[str]) -> None:
    """Let these adapters act, each as strongly as before; loading one switches all others off."""
    network.set_adapter(adapters)
    network.enable_adapters()


def why_not_beside(network: nn.Module) -> str | None:
    """Why a student's adapter cannot be loaded into a network as it is; None where it can."""
    if ADAPTER in getattr(network, "peft_config", {}):
        return f"has an adapter named {ADAPTER} already; delete that, or load it under another name"
    if any(layer.merged for layer in _adapted(network)):
        # PEFT's layers then pass every other adapter by.
        return "has a fused LoRA whose layers are still there; call unload_lora_weights(), which keeps what is fused"
    return None


def why_off(network: nn.Module) -> str | None:
    """What keeps the student's adapter from acting on a network; None where it acts."""
    layers = [layer for layer in network.modules() if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A]
    if not layers:
        return "is not loaded"
    if is_fused(network):
        return None
    if any(layer.merged for layer in layers):
        return "is passed by, since another LoRA is fused"
    if any(layer.disable_adapters for layer in layers):
        return "is disabled"
    if any(ADAPTER not in layer.active_adapters for layer in layers):
        return "is not among the active ones"
    return "has the weight 0" if any(layer.scaling[ADAPTER] == 0 for layer in layers) else None


def is_fused(network: nn.Module) -> bool:
    """Whether the student's adapter was added to the weights while its layers are still there."""
    layers = [layer for layer in network.modules() if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A]
    return bool(layers) and all(ADAPTER in layer.merged_adapters for layer in layers)


def why_not_fused(network: nn.Module) -> str | None:
    """Why no product can be added to the weights of a network; None where it can."""
    if is_quantized(network):
        return "its weights are quantised, and a sum is not rounded back to them"
    weights = [parameter for parameter in network.parameters() if parameter.is_floating_point()]
    small = next((parameter.dtype for parameter in weights if parameter.element_size() < 2), None)
    if small is not None:
        return (
            f"its weights are stored as {str(small).removeprefix('torch.')}, in which a student's small change is lost"
        )
    if any(parameter.is_meta for parameter in weights):
        return "its weights are not here (offloaded); fuse before you offload"
    return None


@torch.no_grad()
def fuse_adapter(network: Any) -> float:
    """Add the student's adapter to the weights of a network for good, and take it away.

    Other adapters stay as they are.

    Returns:
        How much of the change was lost when the weights were rounded to their dtype, as a fraction of its norm.
    """
    lost, whole = 0.0, 0.0
    for layer in network.modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
            weight: Tensor = layer.get_base_layer().weight
            a, b = (getattr(layer, name)[ADAPTER].weight.float() for name in ("lora_A", "lora_B"))
            product = layer.scaling[ADAPTER] * (b.flatten(1) @ a.flatten(1)).view_as(weight)
            before = weight.to(torch.float32, copy=True)
            weight.copy_(before + product)
            lost += float((weight.float() - before - product).double().square().sum())
            whole += float(product.double().square().sum())
    remove_adapter(network)
    return (lost / whole) ** 0.5 if whole else 0.0


def remove_adapter(network: Any) -> None:
    """Take the student's adapter away, and its layers with it where nothing else needs them."""
    if set(getattr(network, "peft_config", {})) <= {ADAPTER}:
        network.unload_lora()
    else:
        network.delete_adapters(ADAPTER)


def has_adapters(network: nn.Module) -> bool:
    """Whether a network's layers are wrapped for adapters."""
    return next(_adapted(network), None) is not None


def _adapted(network: nn.Module) -> Any:
    return (layer for layer in network.modules() if isinstance(layer, BaseTunerLayer))
