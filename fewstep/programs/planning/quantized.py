"""Layers in the sizes of quantised ones, for plans: they have the bytes and no values."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewstep.teachers.quantization import QUANTIZATIONS


class PlannedLinear(nn.Linear):
    """A linear layer in the sizes of a quantised one, for plans: it has the bytes and no values.

    Args:
        layer: in whose place it stands.
        bits: of a weight.
    """

    #: What :func:`fewstep.recording.pipeline.is_quantized_layer` looks for.
    stands_for_quantized = True
    scale: torch.Tensor
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
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # nn.Linear's own can be set, and nobody sets this one
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
