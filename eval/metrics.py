"""Numbers from features: pure functions on tensors, each with its formula and source."""

import logging

import torch
from torch import Tensor

from .features import Reference
from .frechet import feature_statistics, frechet_distance

logger = logging.getLogger(__name__)


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


def manifold_radii(features: Tensor, k: int = 3, chunk: int = 1000) -> Tensor:
    """Distance of each row of features (N, d) to its k-th nearest other row, float64 (N,).

    The radii of the hyperspheres whose union stands for the distribution; `precision_recall` has the source.
    Raises ValueError when there are not more than k rows.
    """
    if len(features) <= k:
        raise ValueError(f"{len(features)} samples have no {k}-th nearest neighbour; generate more")
    points = features.double()
    # The k+1 smallest, because the nearest point is the row itself.
    return torch.cat([_distances(part, points).kthvalue(k + 1, dim=1).values for part in points.split(chunk)])


def precision_recall(
    generated: Tensor, reference: Tensor, *, k: int = 3, reference_radii: Tensor | None = None, chunk: int = 1000
) -> tuple[float, float]:
    """Precision: share of generated (N, d) inside the reference's manifold. Recall: the same the other way round.

    A point is inside where it lies within the k-th-neighbour radius of at least one point of the other set.
    Kynkäänniemi et al. 2019 (arXiv 1904.06991), equations 1-2. Precision alone is fooled by a single good image; recall
    catches that. Both move with the number of samples: compare rows of equal N only.
    reference_radii: `manifold_radii(reference, k)`, when already known. Raises ValueError as `manifold_radii`.
    """
    fake, real = generated.double(), reference.double()
    real_radii = manifold_radii(real, k, chunk) if reference_radii is None else reference_radii
    fake_radii = manifold_radii(fake, k, chunk)
    fake_inside = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    real_inside = []
    for start in range(0, len(real), chunk):
        distances = _distances(real[start : start + chunk], fake)
        fake_inside |= (distances <= real_radii[start : start + chunk, None]).any(0)
        real_inside.append((distances <= fake_radii).any(1))
    return fake_inside.double().mean().item(), torch.cat(real_inside).double().mean().item()


def agreement(logits: Tensor, labels: Tensor) -> float:
    """Share of samples that the classifier takes for the class asked for; logits (N, classes), labels (N,)."""
    return (logits.argmax(1) == labels.to(logits.device)).double().mean().item()


def within_class_spread(features: Tensor, labels: Tensor) -> float:
    """Mean squared distance between two different samples of the same class, averaged over classes.

    For n samples it equals 2 / (n - 1) sum |f - mean|², so no pair is formed. Classes of one sample are left out.
    Raises ValueError when no class has two samples.
    """
    spreads = []
    for label in labels.unique():
        group = features[labels == label].double()
        if len(group) > 1:
            spreads.append(2 * group.var(dim=0, correction=1).sum())
    if not spreads:
        raise ValueError("no class has two samples; generate more")
    return torch.stack(spreads).mean().item()


def diversity(features: Tensor, labels: Tensor, reference: Reference) -> float:
    """`within_class_spread` divided by the reference's own: 1 is as varied as real images, 0 is full collapse."""
    return within_class_spread(features, labels) / within_class_spread(reference.features, reference.labels)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (len(a), len(b)); through a matrix product, in float64 where its cancellation is harmless."""
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")
