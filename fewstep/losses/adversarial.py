"""Non-saturating logistic GAN losses on logits of shape (B,) (Goodfellow et al. 2014; DMD2, §4.3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def generator_loss(logits_fake: Tensor) -> Tensor:
    """mean softplus(-D(fake)); ``logits_fake``: (B,). Returns ()."""
    return F.softplus(-logits_fake.float() if logits_fake.dtype.itemsize < 4 else -logits_fake).mean()


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """mean softplus(D(fake)) + mean softplus(-D(real)); both (B,). Returns ()."""
    return generator_loss(-logits_fake) + generator_loss(logits_real)


def clamped_cross_entropy(logits: Tensor, real: bool, limit: float = 10.0) -> Tensor:
    """The cross entropy of each sample with the label ``real``, its logits clamped to +-``limit``, then averaged.

    ``logits``: (B, ...), several for each sample. Returns (B,), float32 or wider. Source: few-step SiD and SiDA, whose
    discriminators have no parameters of their own and no bounded features.
    """
    logits = (logits.float() if logits.dtype.itemsize < 4 else logits).clamp(-limit, limit)
    return F.softplus(-logits if real else logits).flatten(1).mean(1)


def weighted_mean(losses: Tensor, weight: Tensor, over_batch: bool) -> Tensor:
    """mean(weight * losses), or with ``over_batch`` mean(weight) * mean(losses); both (B,). Returns ().

    SiDA averages its adversarial loss over the whole batch before the samples' weights come in (its released code).
    """
    weight = weight.to(losses)
    return weight.mean() * losses.mean() if over_batch else (weight * losses).mean()
