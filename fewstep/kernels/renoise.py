"""Noising: x_t = alpha x0 + sigma noise, with coefficients of each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fewstep.kernels.dispatch import choose
from fewstep.kernels.rows import at_least_float32, expand, folded, of_one_shape, unfolded


def renoise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma noise (B, ...), in the wider dtype of both, computed in float32 at least.

    Shapes: ``x0``, ``noise``: (B, ...); ``alpha``, ``sigma``: (B,), usually float64. Gradients and tangents flow
        through all four.
    """
    fixed = not (alpha.requires_grad or sigma.requires_grad)
    form = choose("renoise", x0, noise, triton=fixed and of_one_shape(x0, noise))
    if form == "triton":
        result: Tensor = _Renoise.apply(x0, noise, alpha, sigma)
        return result
    return (reference if form == "reference" else closed)(x0, noise, alpha, sigma)


def reference(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The definition; arguments as in :func:`renoise`, (B, ...)."""
    wide, wide_noise = at_least_float32(x0), at_least_float32(noise)
    x_t = expand(alpha, wide) * wide + expand(sigma, wide_noise) * wide_noise
    return x_t.to(torch.promote_types(x0.dtype, noise.dtype))


def closed(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Two passes over memory in the place of three; arguments as in :func:`renoise`, (B, ...)."""
    wide, wide_noise = at_least_float32(x0), at_least_float32(noise)
    x_t = torch.addcmul(expand(sigma, wide_noise) * wide_noise, expand(alpha, wide), wide)
    return x_t.to(torch.promote_types(x0.dtype, noise.dtype))


def example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Any]:
    """Arguments of :func:`renoise` for samples of a shape (B, ...)."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    t = torch.rand(len(x0), generator=generator, dtype=torch.float64).to(device)
    return {"x0": x0.requires_grad_(), "noise": noise, "alpha": 1 - t, "sigma": t}


class _Renoise(Function):
    """The Triton form with its derivatives; the coefficients have tangents, and no gradients."""

    @staticmethod
    def forward(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        from fewstep.kernels.fused import renoise as fused

        return fused.renoise(x0, noise, alpha, sigma, torch.promote_types(x0.dtype, noise.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x0, noise, alpha, sigma = inputs
        ctx.save_for_backward(alpha, sigma)
        ctx.save_for_forward(*inputs)
        ctx.dtypes = x0.dtype, noise.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wide = at_least_float32(gradient)
        of_samples = (
            (expand(coefficient, wide) * wide).to(dtype) if wanted else None
            for coefficient, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad)
        )
        return (*of_samples, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        x0, noise, alpha, sigma = ctx.saved_tensors
        of_samples = closed(tangents[0], tangents[1], alpha, sigma)
        return of_samples + closed(x0, noise, tangents[2], tangents[3]).to(of_samples.dtype)

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        size = info.batch_size
        return unfolded(size, _Renoise.apply(*folded(size, dims, inputs))), 0
