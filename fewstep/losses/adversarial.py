"""GAN losses on logits of shape (B,): non-saturating logistic (Goodfellow et al. 2014; DMD2, §4.3), and hinge."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def generator_loss(logits_fake: Tensor) -> Tensor:
    """mean softplus(-D(fake)); ``logits_fake``: (B,). Returns ()."""
    return F.softplus(-logits_fake.float() if logits_fake.dtype.itemsize < 4 else -logits_fake).mean()


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """mean softplus(D(fake)) + mean softplus(-D(real)); both (B,). Returns ()."""
    return generator_loss(-logits_fake) + generator_loss(logits_real)


def hinge_generator_loss(logits_fake: Tensor) -> Tensor:
    """mean max(0, 1 - D(fake)); ``logits_fake``: (B,). Returns (). Source: Wang et al. 2024, PCM, released code."""
    return F.relu(1 - (logits_fake.float() if logits_fake.dtype.itemsize < 4 else logits_fake)).mean()


def hinge_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """mean max(0, 1 + D(fake)) + mean max(0, 1 - D(real)); both (B,). Returns () (Lim & Ye 2017)."""
    return hinge_generator_loss(-logits_fake) + hinge_generator_loss(logits_real)


def clamped_cross_entropy(logits: Tensor, real: bool, limit: float = 10.0) -> Tensor:
    """The cross entropy of each sample with the label ``real``, its logits clamped to +-``limit``, then averaged.

    ``logits``: (B, ...), several for each sample. Returns (B,), float32 or wider. Source: few-step SiD and SiDA, whose
    discriminators have no parameters of their own and no bounded features.
    """
    logits = (logits.float() if logits.dtype.itemsize < 4 else logits).clamp(-limit, limit)
    return F.softplus(-logits if real else logits).flatten(1).mean(1)


def weighted_mean(
    losses: Tensor,
    weight: Tensor,
    over_batch: bool,
    total: Callable[[Iterable[Tensor]], None] | None = None,
) -> Tensor:
    """mean(weight * losses), or with ``over_batch`` mean(weight) * mean(losses); both (B,), no gradient to the weight.

    SiDA averages its adversarial loss over the whole batch before the samples' weights come in (its released code).

    Args:
        losses: of each sample.
        weight: of each sample.
        over_batch: as SiDA does.
        total: sums tensors over processes in place, so that SiDA's batch is that of all of them.

    Returns:
        (), whose mean over the processes is that of the whole batch.
    """
    weight = weight.detach().to(losses)
    if not over_batch:
        return (weight * losses).mean()
    sums = torch.stack([weight.sum(), torch.ones_like(weight).sum()])
    if total is not None:
        total([sums])
    return sums[0] / sums[1] * losses.mean()
