"""The Fréchet distance of features, in float64 and by symmetric eigendecompositions."""

import logging

import torch
from torch import Tensor

from fewstep.eval.features import Reference

logger = logging.getLogger(__name__)


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance of features.

    Args:
        features: (N, D), any real dtype, N >= 2.

    Returns:
        mean (D,) and covariance (D, D), float64, on the CPU.

    Raises:
        ValueError: for another shape, fewer than two rows, or values that are not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"expected features of shape (N, D) with N >= 2, got {tuple(features.shape)}")
    features = features.detach().cpu().double()
    if not features.isfinite().all():
        raise ValueError("the features hold values that are not finite")
    mean = features.mean(dim=0)
    # Centred before the product: raw second moments lose digits when the mean is large.
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)).

    The trace of the root is taken as that of (cov1^(1/2) cov2 cov1^(1/2))^(1/2): a symmetric matrix, so the result is
    real by construction. Eigenvalues that rounding made negative count as zero.

    Args:
        mean1, mean2: (D,). cov1, cov2: (D, D), symmetric, positive semidefinite. Computed in float64 on the CPU.

    Returns:
        The distance; not negative beyond rounding.

    Raises:
        ValueError: when the shapes disagree or a value is not finite.
    """
    mean1, cov1, mean2, cov2 = (value.detach().cpu().double() for value in (mean1, cov1, mean2, cov2))
    size = mean1.numel()
    if mean1.shape != (size,) or mean2.shape != (size,) or cov1.shape != (size, size) or cov2.shape != (size, size):
        shapes = ", ".join(str(tuple(value.shape)) for value in (mean1, cov1, mean2, cov2))
        raise ValueError(f"expected shapes (D,), (D, D), (D,), (D, D), got {shapes}")
    if not all(value.isfinite().all() for value in (mean1, cov1, mean2, cov2)):
        raise ValueError("the statistics hold values that are not finite")
    values, vectors = torch.linalg.eigh(cov1)
    root1 = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root1 @ cov2 @ root1
    root_trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root_trace)


def frechet(features: Tensor, reference: Reference) -> float:
    """Fréchet distance |m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^1/2) of two Gaussians fitted to features (N, d).

    Heusel et al. 2017 (arXiv 1706.08500), equation 6. Called FID only with the Inception network of that paper.
    Warns below 2d samples, where the covariance is mostly sampling noise and the number mostly bias.
    Raises ValueError for fewer than 2 samples.
    """
    if len(features) < 2:
        raise ValueError("a Fréchet distance needs at least 2 samples")
    if too_few(features):
        logger.warning("%d samples of %d features: the Fréchet distance is mostly sampling bias", *features.shape)
    mean, covariance = feature_statistics(features)
    return float(frechet_distance(mean, covariance, reference.mean, reference.covariance))


def too_few(features: Tensor) -> bool:
    """Whether features (N, d) are too few for a Fréchet distance to mean much: N < 2d."""
    return len(features) < 2 * features.shape[1]
