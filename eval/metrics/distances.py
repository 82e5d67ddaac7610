"""Euclidean distances between two sets of features, in float64 and with zero where rows are equal."""

import torch
from torch import Tensor

# Of |a|² + |b|²: a squared distance below it is what rounding leaves of zero.
_ROUNDING = 1e-13


def distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j| of features a (N, d) and b (M, d) as float64 (N, M), through one matrix product.

    The product cancels where rows lie close: what is not above rounding counts as zero, so that equal rows are no way
    apart.
    """
    a, b = a.double(), b.double()
    size = a.square().sum(1)[:, None] + b.square().sum(1)
    squared = torch.addmm(size, a, b.T, alpha=-2)
    # In place: these matrices are what takes memory and time.
    return squared.masked_fill_(squared <= size.mul_(_ROUNDING), 0).sqrt_()
