"""What a network's raw output says of the clean sample, two outputs combined by classifier-free guidance on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fewstep.kernels.dispatch import choose
from fewstep.kernels.rows import aligned, at_least_float32, expand, folded, of_one_shape, of_samples, unfolded


def guided_x0(
    x_t: Tensor,
    skip: Tensor,
    out: Tensor,
    positive: Tensor,
    negative: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
) -> Tensor:
    """skip x_t + out (negative + w (positive - negative)) (B, ...), in the dtype of ``x_t``, in float32 at least.

    Guidance commutes with the conversion, so the outputs are combined first and converted once (Ho & Salimans 2022;
    Karras et al. 2022, Eq. 7).

    Shapes: ``x_t``: (B, ...); ``positive``, ``negative``: raw outputs (B, ...) in any dtype; without a negative the
        positive alone is converted. ``skip``, ``out``: (B,), usually float64. ``guidance_scale``: w, a number, or (B,),
        or with as many axes as the samples, which it is broadcast to. Gradients and tangents flow through all of them.
    """
    samples = [x_t, positive] if negative is None else [x_t, positive, negative]
    coefficients = [value for value in (skip, out, guidance_scale) if isinstance(value, Tensor)]
    fixed = not any(value.requires_grad for value in coefficients)
    fixed &= of_samples(guidance_scale, len(x_t))
    form = choose("guided_x0", *samples, triton=fixed and of_one_shape(*samples))
    arguments = (x_t, skip, out, positive, negative, guidance_scale)
    if form == "triton":
        x0: Tensor = _GuidedX0.apply(*arguments)
        return x0
    return (reference if form == "reference" else closed)(*arguments)


def reference(
    x_t: Tensor,
    skip: Tensor,
    out: Tensor,
    positive: Tensor,
    negative: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
) -> Tensor:
    """The definition; arguments as in :func:`guided_x0`, (B, ...)."""
    wide = at_least_float32(x_t)
    raw = positive.to(wide.dtype)
    if negative is not None:
        negative = negative.to(wide.dtype)
        raw = negative + _scale(guidance_scale, wide) * (raw - negative)
    return (expand(skip, wide) * wide + expand(out, wide) * raw).to(x_t.dtype)


def closed(
    x_t: Tensor,
    skip: Tensor,
    out: Tensor,
    positive: Tensor,
    negative: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
) -> Tensor:
    """Three passes over memory in the place of six; arguments as in :func:`guided_x0`, (B, ...)."""
    wide = at_least_float32(x_t)
    raw = positive.to(wide.dtype)
    if negative is not None:
        raw = torch.lerp(negative.to(wide.dtype), raw, _scale(guidance_scale, wide))
    return torch.addcmul(expand(skip, wide) * wide, expand(out, wide), raw).to(x_t.dtype)


def example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Any]:
    """Arguments of :func:`guided_x0` for samples of a shape (B, ...): an epsilon network's, guided by 7.5."""
    generator = torch.Generator().manual_seed(seed)
    x_t, positive, other = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    sigma = torch.rand(len(x_t), generator=generator, dtype=torch.float64).to(device)
    alpha = (1.01 - sigma**2).sqrt()
    return {
        "x_t": x_t,
        "skip": 1 / alpha,
        "out": -sigma / alpha,
        "positive": positive.requires_grad_(),
        "negative": torch.lerp(positive.detach(), other, 0.1).requires_grad_(),
        "guidance_scale": 7.5,
    }


class _GuidedX0(Function):
    """The Triton form with its derivatives; the coefficients have tangents, and no gradients."""

    @staticmethod
    def forward(
        x_t: Tensor, skip: Tensor, out: Tensor, positive: Tensor, negative: Tensor | None, scale: float | Tensor
    ) -> Tensor:
        from fewstep.kernels.fused import guided_x0 as fused

        return fused.guided_x0(x_t, skip, out, positive, negative, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_t, skip, out, positive, negative, scale = inputs
        per_sample = scale if isinstance(scale, Tensor) else None
        ctx.save_for_backward(skip, out, per_sample)
        ctx.save_for_forward(x_t, skip, out, positive, negative, per_sample)
        ctx.scale, ctx.guided = scale, negative is not None
        ctx.dtypes = x_t.dtype, positive.dtype, None if negative is None else negative.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 6
        skip, out, per_sample = ctx.saved_tensors
        wide, wanted = at_least_float32(gradient), ctx.needs_input_grad
        of_x_t = (expand(skip, wide) * wide).to(ctx.dtypes[0]) if wanted[0] else None
        share = _scale(ctx.scale if per_sample is None else per_sample, wide) if ctx.guided else 1.0
        of_positive, of_negative = (
            (expand(out, wide) * part * wide).to(dtype) if asked else None
            for asked, part, dtype in zip(wanted[3:5], (share, 1 - share), ctx.dtypes[1:])
        )
        return of_x_t, None, None, of_positive, of_negative, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        x_t, skip, out, positive, negative, per_sample = ctx.saved_tensors
        scale = ctx.scale if per_sample is None else per_sample
        d_x_t, d_skip, d_out, d_positive, d_negative, d_scale = tangents

        def or_zero(tangent: Tensor | None, like: Tensor) -> Tensor:
            return torch.zeros_like(like) if tangent is None else tangent

        result = torch.zeros_like(x_t)
        if not (d_x_t is None and d_positive is None and d_negative is None):
            d_negative = None if negative is None else or_zero(d_negative, negative)
            result = closed(or_zero(d_x_t, x_t), skip, out, or_zero(d_positive, positive), d_negative, scale)
        if not (d_skip is None and d_out is None):
            changed = or_zero(d_skip, skip), or_zero(d_out, out)
            result = result + closed(x_t, *changed, positive, negative, scale)
        if d_scale is not None and negative is not None:
            wide = at_least_float32(x_t)
            rate = expand(out, wide) * expand(d_scale, wide) * (positive.to(wide) - negative.to(wide))
            result = result + rate.to(x_t.dtype)
        return result

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        return unfolded(size, _GuidedX0.apply(*folded(size, dims, inputs))), 0


def _scale(guidance_scale: float | Tensor, like: Tensor) -> Any:
    return aligned(guidance_scale, like) if isinstance(guidance_scale, Tensor) else guidance_scale
