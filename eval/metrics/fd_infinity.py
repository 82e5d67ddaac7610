"""The Fréchet distance that infinitely many samples would have."""

import torch
from torch import Tensor

from fewstep.eval.metrics.frechet import feature_statistics, frechet_distance

# As in the paper: the smallest number is that of a usable distance, or a tenth where there are fewer.
_SMALLEST = 5000


def fd_infinity(
    features: Tensor, mean: Tensor, covariance: Tensor, *, points: int = 15, seed: int = 0
) -> tuple[float, float]:
    """Where the line of Fréchet distances over 1/N meets 1/N = 0, and the standard error of that point in the fit.

    A Fréchet distance of N samples is too large by about c/N, with a c that depends on the generator, so that even
    distances of one N may be in the wrong order. Chong and Forsyth 2020 (arXiv 1911.07023): a least-squares
    line through distances of random subsets of ``points`` sizes between 5000, or a tenth of the samples where those are
    fewer, and all. It removes the bias of the samples, not that of the reference. It may be slightly negative.

    Args:
        features: (N, d), float. mean: (d,) and covariance: (d, d) of the reference. Computed in float64.
        points: sizes of subsets.
        seed: of the subsets.

    Raises:
        ValueError: fewer than 30 samples, of which no line can be told.
    """
    num = len(features)
    if num < 2 * points:
        raise ValueError(f"a line of Fréchet distances needs at least {2 * points} samples")
    sizes = torch.linspace(min(_SMALLEST, max(num // 10, 2)), num, points, dtype=torch.float64).long()
    draws = torch.Generator().manual_seed(seed)
    found = [
        frechet_distance(
            *feature_statistics(features[torch.randperm(num, generator=draws)[:size].to(features.device)]),
            mean,
            covariance,
        )
        for size in sizes.tolist()
    ]
    return _at_zero(1 / sizes.double(), torch.tensor(found, dtype=torch.float64))


def _at_zero(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The intercept of the least-squares line through points (n,), and its standard error."""
    centred = x - x.mean()
    spread = centred.square().sum()
    slope = (centred * y).sum() / spread
    intercept = y.mean() - slope * x.mean()
    left = (y - intercept - slope * x).square().sum() / (len(x) - 2)
    return intercept.item(), (left * (1 / len(x) + x.mean() ** 2 / spread)).sqrt().item()
