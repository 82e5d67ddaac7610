"""MeanFlow's target: the velocity less a share of how the average velocity changes along the flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.kernels.dispatch import choose, refuse_tangents
from fewstep.kernels.rows import at_least_float32, expand, of_one_shape


def mean_flow_target(velocity: Tensor, derivative: Tensor, gap: Tensor) -> Tensor:
    """v - gap du/dt (B, ...), in the dtype of ``velocity``, in float32 at least (Geng et al. 2025, MeanFlow, Eq. 11).

    Shapes: ``velocity``, ``derivative``: (B, ...); ``gap``: (B,), usually float64. Training asks for no gradient; where
        one is asked for, torch computes it.

    Raises:
        NotImplementedError: the Triton form is differentiated forward.
    """
    fixed = not (velocity.requires_grad or derivative.requires_grad or gap.requires_grad)
    form = choose("mean_flow_target", velocity, derivative, triton=fixed and of_one_shape(velocity, derivative))
    if form == "triton":
        refuse_tangents("mean_flow_target", velocity, derivative, gap)
        from fewstep.kernels.fused import renoise as fused

        return fused.renoise(velocity, derivative, torch.ones_like(gap), -gap, velocity.dtype)
    return (reference if form == "reference" else closed)(velocity, derivative, gap)


def reference(velocity: Tensor, derivative: Tensor, gap: Tensor) -> Tensor:
    """The definition; arguments as in :func:`mean_flow_target`, (B, ...)."""
    wide = at_least_float32(velocity)
    return (wide - expand(gap, wide) * derivative.to(wide.dtype)).to(velocity.dtype)


def closed(velocity: Tensor, derivative: Tensor, gap: Tensor) -> Tensor:
    """One pass over memory in the place of two; arguments as in :func:`mean_flow_target`, (B, ...)."""
    wide = at_least_float32(velocity)
    return torch.addcmul(wide, expand(gap, wide), derivative.to(wide.dtype), value=-1).to(velocity.dtype)


def example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Any]:
    """Arguments of :func:`mean_flow_target` for samples of a shape (B, ...)."""
    generator = torch.Generator().manual_seed(seed)
    velocity, derivative = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    gap = torch.rand(len(velocity), generator=generator, dtype=torch.float64).to(device)
    return {"velocity": velocity, "derivative": derivative, "gap": gap}
