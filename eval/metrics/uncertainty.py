"""How far a number would move with other samples."""

from collections.abc import Callable

import torch
from torch import Tensor


def standard_error(values: Tensor) -> float:
    """Of the mean of independent values (N,): their deviation over the root of N; not a number for fewer than two."""
    if len(values) < 2:
        return float("nan")
    return (values.double().std(correction=1) / len(values) ** 0.5).item()


def jackknife_error(statistic: Callable[[Tensor], Tensor | float], num: int) -> float:
    """The standard error of a statistic from its values without one sample each: sqrt((n - 1)/n sum (s_i - mean)²).

    Args:
        statistic: takes the indices int64 (num - 1,) of the samples that are kept.
        num: samples there are.

    Raises:
        ValueError: fewer than three samples.
    """
    if num < 3:
        raise ValueError("leaving one out needs at least 3 samples")
    every = torch.arange(num)
    found = torch.tensor([float(statistic(every[every != left])) for left in range(num)], dtype=torch.float64)
    return (found.var(correction=0) * (num - 1)).sqrt().item()
