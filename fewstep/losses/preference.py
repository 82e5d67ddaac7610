"""Preferences between two successors of one noised sample: how likely the student and a reference make them.

A stochastic step draws z = mean + sigma noise, so that the logarithm of a likelihood ratio is a difference of squares
(Flash-DMD, arXiv 2511.20549; the pairwise loss is Diffusion-DPO's, Wallace et al. 2023, arXiv 2311.12908).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def log_likelihood_ratio(z: Tensor, mean: Tensor, reference: Tensor, sigma: Tensor) -> Tensor:
    """log p(z) - log p_ref(z) of N(mean, sigma^2) and N(reference, sigma^2), in the mean over a sample's elements.

    That is -(|z - mean|^2 - |z - reference|^2) / (2 sigma^2 n), with n elements in a sample; as in Diffusion-DPO it is
    the mean and not the sum, so that one beta serves samples of every size.

    Shapes: ``z``, ``mean``, ``reference``: (B, ...); ``sigma``: (B,). Returns (B,), float32 or wider, with gradient to
        the means.
    """
    z, mean, reference = (x.float() if x.dtype.itemsize < 4 else x for x in (z, mean, reference))
    # The difference of the squares, without a difference of two large numbers.
    apart = ((mean - reference) * (2 * z - mean - reference)).flatten(1).mean(1)
    return apart / (2 * sigma.to(apart) ** 2)


def preference_loss(ratio_better: Tensor, ratio_worse: Tensor, beta: float) -> Tensor:
    """mean of -log sigmoid(beta (ratio_better - ratio_worse)).

    Args:
        ratio_better: of the successor that is preferred (B,), see :func:`log_likelihood_ratio`.
        ratio_worse: of the other one (B,).
        beta: how fast a lead over the reference is enough.

    Returns:
        ().
    """
    return -F.logsigmoid(beta * (ratio_better - ratio_worse)).mean()
