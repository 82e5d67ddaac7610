"""Whether samples are copies of training images, which distances between distributions reward."""

import torch
from torch import Tensor

from fewstep.eval.metrics.distances import distances


def nearest(features: Tensor, training: Tensor, *, chunk: int = 1000) -> tuple[Tensor, Tensor]:
    """For each of features (N, d): the distance to the nearest training image (M, d), and which one it is.

    Returns:
        Distances float64 (N,) and indices int64 (N,).

    Raises:
        ValueError: no training image.
    """
    if not len(training):
        raise ValueError("there are no training images to compare with")
    parts = [distances(part, training).min(dim=1) for part in features.split(chunk)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def memorisation(
    features: Tensor, training: Tensor, held_out: Tensor | None = None, *, share: float = 0.05
) -> tuple[float, ...]:
    """How near samples come to training images, beside images that nothing was trained on.

    Without ``held_out``: the median distance of a sample to its nearest training image, alone a number without a scale.
    With it also

        ratio = median_j d(y_j) / median_i d(h_i), copies = mean_j [d(y_j) < q]

    with d the distance to the nearest training image, y the samples, h held-out images, and q the distance that 5% of
    those are below. A generator that has learnt the law has 1 and 0.05; one that copies has a ratio near 0 and copies
    near 1. After Meehan et al. 2020 (arXiv 2004.05675), who compare the same two sets of distances by ranks.

    Args:
        features: (N, d), float, of samples. training: (M, d). held_out: (K, d), images of the same law.
        share: of the held-out images that are nearer than q.

    Returns:
        (median distance,) or (median distance, ratio, copies).

    Raises:
        ValueError: a set that is empty, or held-out images that are training images themselves.
    """
    if not len(features) or (held_out is not None and not len(held_out)):
        raise ValueError("nearest training images need a sample, and held-out images where they are given")
    found, _ = nearest(features, training)
    median = found.median().item()
    if held_out is None:
        return (median,)
    unseen, _ = nearest(held_out, training)
    typical = unseen.median().item()
    if typical == 0:
        raise ValueError("the held-out images are among the training images")
    return median, median / typical, (found < unseen.quantile(share)).double().mean().item()
