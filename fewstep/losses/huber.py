"""The pseudo-Huber distance of whole samples, a square near zero and a norm far from it (Song & Dhariwal 2023, iCT)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.kernels.error_sums import error_sums


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """sqrt(|e|^2 + c^2) - c of each sample, the norm over all its entries: (B, ...) -> (B,); the norm where c is 0.

    Source: Song & Dhariwal 2023 (iCT), Eq. 7.
    """
    return pseudo_huber_of(error_sums(error), c)


def norm(squared: Tensor) -> Tensor:
    """The root of ``squared`` (B,), whose gradient at 0 is 0 and not a division by 0; (B,)."""
    some = squared > 0
    return torch.where(some, torch.where(some, squared, 1.0).sqrt(), squared)


def pseudo_huber_of(squared: Tensor, c: float) -> Tensor:
    """:func:`pseudo_huber` of samples whose squared norms are ``squared``: (B,) -> (B,)."""
    if c == 0:
        return norm(squared)
    return squared / ((squared + c**2).sqrt() + c)  # without the difference of two nearly equal numbers


def huber_constant(dimensions: int, factor: float = 0.00054, scaling: str = "sqrt") -> float:
    """c of :func:`pseudo_huber`: ``factor`` * sqrt(d), or with ``scaling="released"`` factor * d.

    Source: Song & Dhariwal 2023 (iCT), §3.3: 0.00054 sqrt(d). The released code of 2-rectified flow++ multiplies by d
    (1.66 instead of 0.03 for 3 x 32 x 32); its author says that the root was meant.

    Raises:
        ValueError: another ``scaling``.
    """
    if scaling not in ("sqrt", "released"):
        raise ValueError(f"scaling is sqrt or released, not {scaling!r}")
    return factor * (math.sqrt(dimensions) if scaling == "sqrt" else dimensions)
