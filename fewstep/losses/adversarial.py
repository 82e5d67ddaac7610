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
