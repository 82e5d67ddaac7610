"""Noising: x_t = alpha x0 + sigma noise, with coefficients of each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fewstep.kernels.dispatch import choose
from fewstep.kernels.rows import at_least_float32, expand, folded, unfolded


def renoise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma noise (B, ...), in the wider dtype of both, computed in float32 at least.

    Shapes: ``x0``, ``noise``: (B, ...); ``alpha``, ``sigma``: (B,), usually float64. Gradients and tangents flow
        through all four.
    """
    form = choose("renoise", x0, noise)
    if form == "triton":
        result: Tensor = _Renoise.apply(x0, noise, alpha, sigma)
        return result
    return (reference if form == "reference" else closed)(x0, noise, alpha, sigma)


def reference(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The definition; arguments as in :func:`renoise`, (B, ...)."""
    wide, wide_noise = at_least_float32(x0), at_least_float32(noise)
    x_t = expand(alpha, wide) * wide + expand(sigma, wide_noise) * wide_noise
    return x_t.to(torch.result_type(x0, noise))


def closed(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Two passes over memory in the place of three; arguments as in :func:`renoise`, (B, ...)."""
    wide, wide_noise = at_least_float32(x0), at_least_float32(noise)
    x_t = torch.addcmul(expand(sigma, wide_noise) * wide_noise, expand(alpha, wide), wide)
    return x_t.to(torch.result_type(x0, noise))


def example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Any]:
    """Arguments of :func:`renoise` for samples of a shape (B, ...)."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    t = torch.rand(len(x0), generator=generator, dtype=torch.float64).to(device)
    return {"x0": x0.requires_grad_(), "noise": noise, "alpha": 1 - t, "sigma": t}


class _Renoise(Function):
    """The Triton form with its derivatives."""

    @staticmethod
    def forward(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        from fewstep.kernels.fused import renoise as fused

        return fused.renoise(x0, noise, alpha, sigma, torch.result_type(x0, noise))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Samples are kept for the coefficients' derivatives alone, which training does not ask for.
        x0, noise, alpha, sigma = inputs
        ctx.save_for_backward(x0 if alpha.requires_grad else None, noise if sigma.requires_grad else None, alpha, sigma)
        ctx.save_for_forward(*inputs)
        ctx.dtypes = x0.dtype, noise.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x0, noise, alpha, sigma = ctx.saved_tensors
        wide, wanted = at_least_float32(gradient), ctx.needs_input_grad
        return (
            (expand(alpha, wide) * wide).to(ctx.dtypes[0]) if wanted[0] else None,
            (expand(sigma, wide) * wide).to(ctx.dtypes[1]) if wanted[1] else None,
            (wide * x0).flatten(1).sum(1).to(alpha.dtype) if wanted[2] else None,
            (wide * noise).flatten(1).sum(1).to(sigma.dtype) if wanted[3] else None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        x0, noise, alpha, sigma = ctx.saved_tensors
        of_samples = closed(tangents[0], tangents[1], alpha, sigma)
        return of_samples + closed(x0, noise, tangents[2], tangents[3]).to(of_samples.dtype)

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        size = info.batch_size
        return unfolded(size, _Renoise.apply(*folded(size, dims, inputs))), 0
