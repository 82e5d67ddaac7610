"""The kernel distance of features: an unbiased comparison of two sets that assumes no Gaussian."""

import torch
from torch import Tensor


def kid(
    features: Tensor, reference: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation, over random subsets, of the squared maximum mean discrepancy (MMD²).

    With m samples x of one set and m samples y of the other, and k(a, b) = (a·b / d + 1)³,

        MMD² = sum_{i≠j} [k(x_i, x_j) + k(y_i, y_j)] / (m (m - 1)) - 2 sum_{ij} k(x_i, y_j) / m²

    Bińkowski et al. 2018 (arXiv 1801.01401); degree 3, gamma 1/d, coefficient 1, 100 subsets of 1000 as in
    all implementations. KID is its name with the network of FID.

    The estimator is unbiased, so that two sets of one law may have a negative distance, and a set against itself always
    has one: its pairs i = j stand in the last sum alone. Subsets are as large as the smaller set where that has fewer
    than ``size``; the deviation is then that of few draws, and zero where both sets are of that number.

    Args:
        features: (N, d), float. reference: (M, d). Computed in float64 on the device of ``features``.
        subsets: number of draws, each without replacement.
        size: samples in a draw.
        seed: of the draws.

    Raises:
        ValueError: fewer than two samples in a set, or widths that differ.
    """
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"features of width {features.shape[1]} and a reference of width {reference.shape[1]}")
    size = min(size, len(features), len(reference))
    if size < 2:
        raise ValueError("a kernel distance needs at least 2 samples of each set")
    if size == len(features) == len(reference):
        subsets = 1  # every draw is the whole of both
    draws = torch.Generator().manual_seed(seed)
    found = torch.stack(
        [_discrepancy(_draw(features, size, draws), _draw(reference, size, draws)) for _ in range(subsets)]
    )
    return found.mean().item(), found.std(correction=0).item()


def _draw(rows: Tensor, size: int, draws: torch.Generator) -> Tensor:
    """``size`` different rows, as float64."""
    return rows[torch.randperm(len(rows), generator=draws)[:size].to(rows.device)].double()


def _discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """MMD² of two sets (m, d)."""
    size = len(x)
    within = sum(kernel.sum() - kernel.trace() for kernel in (_kernel(x, x), _kernel(y, y)))
    return within / (size * (size - 1)) - 2 * _kernel(x, y).mean()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3
