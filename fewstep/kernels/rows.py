"""What all operations do alike with samples (B, ...): coefficients for each of them, a dtype, and rows for vmap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """``coefficient`` (B,) in the dtype and device of ``like`` (B, ...), shaped (B, 1, ...) to broadcast over it."""
    return coefficient.to(device=like.device, dtype=like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def aligned(scale: Tensor, like: Tensor) -> Tensor:
    """``scale``, (B,) or of as many axes as ``like`` (B, ...), in its dtype and device, shaped to broadcast over it."""
    return scale.to(like) if scale.dim() == like.dim() else expand(scale, like)


def of_samples(scale: float | Tensor, count: int) -> bool:
    """Whether a scale is one number, or one for each of B samples: kernels take no other."""
    return not isinstance(scale, Tensor) or scale.numel() == 1 or scale.numel() == len(scale) == count


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` (B, ...) itself where it is float32 or float64, else in float32: what losses are computed in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def of_one_shape(*samples: Tensor) -> bool:
    """Whether the samples (B, ...) have one shape: kernels do not broadcast."""
    return all(sample.shape == samples[0].shape for sample in samples)


def folded(size: int, dims: Sequence[int | None], values: Sequence[Any]) -> list[Any]:
    """The arguments of a vmap rule over ``size`` batches as one batch of size * B rows: (N, B, ...) becomes (N B, ...).

    An operation whose rows do not know of each other is vmapped by that. What is no tensor stays as it is.
    """

    def fold(value: Any, dim: int | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        stacked = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
        return stacked.flatten(0, 1)

    return [fold(value, dim) for value, dim in zip(values, dims, strict=True)]


def unfolded(size: int, value: Tensor) -> Tensor:
    """The inverse of :func:`folded`: (N B, ...) becomes (N, B, ...)."""
    return value.unflatten(0, (size, -1))
