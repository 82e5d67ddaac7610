"""The distance of CLIP embeddings under a Gaussian kernel, which a few thousand samples are enough for."""

import torch
from torch import Tensor

_WIDTH = 10.0  # of the kernel
_SCALE = 1000.0  # so that numbers are of a readable size


def cmmd(features: Tensor, reference: Tensor, *, chunk: int = 2000) -> float:
    """1000 MMD² with the kernel k(a, b) = exp(-|a - b|² / (2 · 10²)) and the biased estimator

        MMD² = mean_ij k(x_i, x_j) + mean_ij k(y_i, y_j) - 2 mean_ij k(x_i, y_j)

    Jayasumana et al. 2024 (arXiv 2401.09603), for embeddings of length one of CLIP ViT-L/14
    at 336x336. Biased, as published: never negative, zero for a set against itself, and larger for few samples, by
    about 1000 (1 - E k) (1/N + 1/M).

    Args:
        features: (N, d) and reference: (M, d), float, of length one. Computed in float64.
        chunk: rows whose kernel is held at a time.

    Raises:
        ValueError: no sample in a set, or widths that differ.
    """
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"features of width {features.shape[1]} and a reference of width {reference.shape[1]}")
    if not len(features) or not len(reference):
        raise ValueError("a distance needs samples of each set")
    x, y = features.double(), reference.double()
    return _SCALE * (_mean_kernel(x, x, chunk) + _mean_kernel(y, y, chunk) - 2 * _mean_kernel(x, y, chunk))


def _mean_kernel(a: Tensor, b: Tensor, chunk: int) -> float:
    sizes = b.square().sum(1)
    total = a.new_zeros(())
    for part in a.split(chunk):
        squared = part.square().sum(1)[:, None] + sizes - 2 * (part @ b.T)
        total += torch.exp(squared / (-2 * _WIDTH**2)).sum()
    return total.item() / (len(a) * len(b))
