"""Precision and recall of features by nearest neighbours (Kynkäänniemi et al. 2019)."""

import torch
from torch import Tensor

from fewstep.eval.metrics.distances import distances


def neighbour_distances(features: Tensor, most: int, chunk: int = 1000) -> Tensor:
    """Distances of each row of features (N, d) to its nearest other rows, the nearest first, float64 (N, most).

    Raises ValueError when there are not more than ``most`` rows.
    """
    if len(features) <= most:
        raise ValueError(f"{len(features)} samples have no {most}-th nearest neighbour; generate more")
    points = features.double()
    # One more, because the nearest point is the row itself. topk takes a tenth of kthvalue's time.
    nearest = [distances(part, points).topk(most + 1, largest=False).values[:, 1:] for part in points.split(chunk)]
    return torch.cat(nearest)


def manifold_radii(features: Tensor, k: int = 3, chunk: int = 1000) -> Tensor:
    """Distance of each row of features (N, d) to its k-th nearest other row, float64 (N,).

    The radii of the hyperspheres whose union stands for the distribution; `precision_recall` has the source.
    Raises ValueError when there are not more than k rows.
    """
    return neighbour_distances(features, k, chunk)[:, k - 1]


def precision_recall(
    generated: Tensor, reference: Tensor, reference_radii: Tensor | None = None, *, k: int = 3, chunk: int = 1000
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
        apart = distances(real[start : start + chunk], fake)
        fake_inside |= (apart <= real_radii[start : start + chunk, None]).any(0)
        real_inside.append((apart <= fake_radii).any(1))
    return fake_inside.double().mean().item(), torch.cat(real_inside).double().mean().item()
