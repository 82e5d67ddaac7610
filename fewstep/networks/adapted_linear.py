"""A linear layer and the adapter beside it as one product with the sum of both weights, made anew in every pass.

Beside a layer x W^T an adapter asks for two small products forward and four backward, and their sums and scalings pass
over memory as often as a large product does. With W' = W + scale B A, which costs rank / tokens of the layer, the
forward pass is one product and the backward pass two small ones more than that to x. Nothing frozen is written, and W'
lives no longer than the product with it.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.kernels.dispatch import has_tangent

#: A sum in fewer bits would round what the adapter has learnt so far.
_WIDE = (torch.float32, torch.float64)


class AdaptedLinear(Linear):  # type: ignore[misc]  # PEFT has no types
    """PEFT's layer, whose answer is one product where that is the same and less work."""

    @staticmethod
    def take_over(layer: nn.Module) -> None:
        """Make an adapted layer one of these, if it is an ordinary one."""
        if type(layer) is Linear and type(layer.base_layer) is nn.Linear:
            layer.__class__ = AdaptedLinear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        if self._disable_adapters or args or kwargs:
            return super().forward(x, *args, **kwargs)
        name = self._active_adapter[0]
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        if not _pays(x, base.weight) or not _same_in_sum(x, base.weight, a, b):
            return super().forward(x)
        return product(x, base.weight, base.bias, a, b, self.scaling[name])


def product(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x (W + scale B A)^T + bias, with gradients for x, A and B.

    Args:
        x: (..., in).
        weight: W (out, in), frozen.
        bias: (out,), frozen.
        a: A (rank, in).
        b: B (out, rank).
        scale: of the adapter's product.

    Returns:
        (..., out).
    """
    answer: Tensor = _Product.apply(x, weight, bias, a, b, scale)
    return answer


class _Product(torch.autograd.Function):
    """As :func:`product`; its backward pass can be differentiated once more."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return F.linear(x, torch.addmm(weight, b, a, alpha=scale), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, a, b, ctx.scale = inputs
        ctx.save_for_backward(x, weight, a, b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        to_x = to_a = to_b = None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ torch.addmm(weight, b, a, alpha=ctx.scale)
        # The rank comes first in each of these: products with so few columns take a CPU several times as long.
        rows, rising = x.flatten(0, -2), gradient.flatten(0, -2)
        if ctx.needs_input_grad[3]:
            to_a = ctx.scale * ((b.mT @ rising.mT) @ rows)
        if ctx.needs_input_grad[4]:
            to_b = ctx.scale * ((a @ rows.mT) @ rising).mT
        return to_x, None, None, to_a, to_b, None


def _pays(x: Tensor, weight: Tensor) -> bool:
    """Whether the sum, which passes over the weight, is less than what passes over the rows of x."""
    return x.ndim > 1 and x.numel() // x.shape[-1] >= min(weight.shape)


def _same_in_sum(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether all is of one wide type, nothing is cast on the way, and no derivative is taken forward."""
    one_type = x.dtype == weight.dtype == a.dtype == b.dtype and x.dtype in _WIDE
    return one_type and not torch.is_autocast_enabled(x.device.type) and not has_tangent(x, a, b)
