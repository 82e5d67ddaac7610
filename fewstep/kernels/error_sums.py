"""Sums over samples of an error's squares, absolute values or pseudo-Huber values: what all distances are made of.

What is done with a sum of each sample is done with B numbers, by ordinary operations
(:mod:`fewstep.losses.consistency`, :mod:`fewstep.losses.mean_flow`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fewstep.kernels.dispatch import choose
from fewstep.kernels.rows import at_least_float32, expand, folded, of_one_shape, unfolded

Kind = Literal["squares", "absolutes", "pseudo_huber"]
KINDS: tuple[Kind, ...] = ("squares", "absolutes", "pseudo_huber")


def error_sums(a: Tensor, b: Tensor | None = None, kind: Kind = "squares", c: float = 1.0) -> Tensor:
    """The sum over each sample of e^2, |e| or sqrt(e^2 + c^2) - c, with e = a - b: (B,), in float32 at least.

    The gradient is 2 e, the sign of e, or e / sqrt(e^2 + c^2), times that of the sum.

    Shapes: ``a``, ``b``: (B, ...), any float dtype; without ``b`` the error is ``a``. ``c``: above 0.
    """
    samples = [value for value in (a, b) if value is not None]
    form = choose("error_sums", *samples, triton=of_one_shape(*samples))
    if form == "reference":
        return reference(a, b, kind, c)
    return _sums(a, b, kind, c) if form == "triton" else closed(a, b, kind, c)


def reference(a: Tensor, b: Tensor | None = None, kind: Kind = "squares", c: float = 1.0) -> Tensor:
    """The definition; arguments as in :func:`error_sums`, (B,)."""
    error = _error(a, b).flatten(1)
    if kind == "squares":
        return error.square().sum(1)
    if kind == "absolutes":
        return error.abs().sum(1)
    squared = error.square()
    return (squared / ((squared + c**2).sqrt() + c)).sum(1)  # without the difference of two nearly equal numbers


def closed(a: Tensor, b: Tensor | None = None, kind: Kind = "squares", c: float = 1.0) -> Tensor:
    """Few passes over memory each way; arguments as in :func:`error_sums`, (B,)."""
    if kind == "squares" and b is not None:  # torch has that as one kernel, and its gradient as another
        values = F.mse_loss(at_least_float32(a), at_least_float32(b), reduction="none")
        return values.flatten(1).sum(1)
    if kind != "pseudo_huber" or torch.compiler.is_compiling():
        return reference(a, b, kind, c)  # the compiler fuses by itself, and would forget this function's tangent
    return _sums(a, b, kind, c, triton=False)


def example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Any]:
    """Arguments of :func:`error_sums` for samples of a shape (B, ...): the squares of a student's error."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    return {"a": a.requires_grad_(), "b": b, "kind": "squares", "c": 0.03}


class _ErrorSums(Function):
    """The Triton form, and the pseudo-Huber value of the closed form, with their derivatives."""

    @staticmethod
    def forward(a: Tensor, b: Tensor | None, kind: Kind, c: float, triton: bool) -> Tensor:
        if triton:
            from fewstep.kernels.fused import error_sums as fused

            return fused.sums(a, b, kind, c)
        error = _error(a, b)
        squared = error.square()
        return squared.div_((squared + c**2).sqrt_().add_(c)).flatten(1).sum(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, ctx.kind, ctx.c, ctx.triton = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        if ctx.triton:
            from fewstep.kernels.fused import error_sums as fused

            slope = fused.slopes(a, b, ctx.kind, ctx.c, gradient)
        else:
            slope = _slope(a, b, ctx.kind, ctx.c, gradient)
        of_a, of_b = (
            slope.to(value.dtype) if wanted and value is not None else None
            for value, wanted in zip((a, b), ctx.needs_input_grad)
        )
        return of_a, None if of_b is None else -of_b, None, None, None

    @staticmethod
    def jvp(ctx: Any, d_a: Tensor, d_b: Tensor | None, *_: None) -> Tensor:
        a, b = ctx.saved_tensors
        ones = torch.ones(len(a), device=a.device)
        return (_slope(a, b, ctx.kind, ctx.c, ones) * _error(d_a, d_b)).flatten(1).sum(1)

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        return unfolded(size, _ErrorSums.apply(*folded(size, dims, inputs))), 0


def _sums(a: Tensor, b: Tensor | None, kind: Kind, c: float, triton: bool = True) -> Tensor:
    sums: Tensor = _ErrorSums.apply(a, b, kind, c, triton)
    return sums


def _error(a: Tensor, b: Tensor | None) -> Tensor:
    wide = at_least_float32(a)
    return wide if b is None else wide - at_least_float32(b)


def _slope(a: Tensor, b: Tensor | None, kind: Kind, c: float, gradient: Tensor) -> Tensor:
    """``gradient`` (B,) of the sums times the derivative of the error's value (B, ...)."""
    error = _error(a, b)
    if kind == "squares":
        return error * expand(2 * gradient, error)
    if kind == "absolutes":
        return error.sign() * expand(gradient, error)
    return (error * expand(gradient, error)).div_((error.square().add_(c**2)).sqrt_())
