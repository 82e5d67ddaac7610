"""How far a number would move with other samples."""

from collections.abc import Callable

import torch
from torch import Tensor


def standard_error(values: Tensor) -> float:
    """Of the mean of independent values (N,): their deviation over the root of N; not a number for fewer than two."""
    if len(values) < 2:
        return float("nan")
    return (values.double().std(correction=1) / len(values) ** 0.5).item()


def bootstrap_error(
    statistic: Callable[[Tensor], Tensor | float], num: int, *, repeats: int = 200, seed: int = 0
) -> float:
    """Deviation of a statistic over ``repeats`` sets of ``num`` samples drawn with replacement (Efron 1979).

    Not for distances to a reference, which the equal samples of such sets push up: of those the sizes of the sets
    matter, and repeated evaluations with other seeds tell more.

    Args:
        statistic: takes the indices int64 (num,) of a set.
        num: samples there are.
        seed: of the draws.

    Raises:
        ValueError: fewer than two samples.
    """
    if num < 2:
        raise ValueError("resampling needs at least 2 samples")
    draws = torch.Generator().manual_seed(seed)
    found = [float(statistic(torch.randint(num, (num,), generator=draws))) for _ in range(repeats)]
    return torch.tensor(found, dtype=torch.float64).std(correction=1).item()


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
