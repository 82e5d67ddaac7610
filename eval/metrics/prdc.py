"""Density and coverage of features by nearest neighbours (Naeem et al. 2020)."""

import torch
from torch import Tensor

from fewstep.eval.metrics.distances import distances
from fewstep.eval.metrics.precision_recall import manifold_radii

# A point on a sphere is no point inside it, whichever way rounding falls.
_INSIDE = 1 - 1e-9


def density_coverage(
    generated: Tensor, reference: Tensor, reference_radii: Tensor | None = None, *, k: int = 5, chunk: int = 1000
) -> tuple[float, float]:
    """How densely the generated lie where the reference does, and the share of the reference that they reach.

        density = sum_j sum_i [|y_j - x_i| < r_i] / (k M), coverage = mean_i [min_j |y_j - x_i| < r_i]

    with x of the reference, y (M) generated, and r_i the distance of x_i to its k-th nearest other x. Naeem et al. 2020
    (arXiv 2002.09797), with k = 5 as there and strict as in the authors' code. Neither trusts a
    single outlier of the reference, as precision does, or of the generated, as recall does. Density may exceed 1, which
    is what two sets of one law have on average; coverage then is 1 - 2^-k for large sets.

    A set against itself has 1 and 1. Points on a sphere are outside: of a reference of which more than k rows are
    equal, the sphere is empty, and copies of that row count as not covered. Compare rows of equal N and M only.

    Args:
        generated: (M, d), float. reference: (N, d).
        reference_radii: ``manifold_radii(reference, k)``, when already known.
        k: neighbours.
        chunk: rows of the reference whose distances are held at a time.

    Raises:
        ValueError: no generated sample, or not more than k of the reference. (The authors' code needs k + 2.)
    """
    if not len(generated):
        raise ValueError("density and coverage need a generated sample")
    radii = (manifold_radii(reference, k, chunk) if reference_radii is None else reference_radii) * _INSIDE
    inside = torch.zeros((), dtype=torch.float64, device=generated.device)
    covered = torch.zeros_like(inside)
    for part, radius in zip(reference.split(chunk), radii.split(chunk), strict=True):
        within = distances(part, generated) < radius[:, None]
        inside += within.sum()
        covered += within.any(1).sum()
    return inside.item() / (k * len(generated)), covered.item() / len(reference)
