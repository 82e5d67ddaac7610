"""A discriminator of pixels: heads that tell by a frozen network's features whether an image is real (Flash-DMD)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.critic.jumps import LOSSES
from fewstep.networks.roles import Role


class ImageJudge:
    """Judges what samples show.

    Args:
        role: with heads for the features.
        features: from x0 (B, ...) to features of what it shows, by levels, with gradient to x0.
        loss: one of :data:`fewstep.critic.jumps.LOSSES`.
    """

    def __init__(self, role: Role, features: Callable[[Tensor], list[Tensor]], loss: str) -> None:
        self.role, self.features = role, features
        self._student_loss, self._own_loss = LOSSES[loss]

    def student_loss(self, fake: list[Tensor]) -> Tensor:
        """() with gradient to the student's features, the mean over samples and levels."""
        return self._student_loss(self.role.added["heads"](fake))

    def own_loss(self, fake: list[Tensor], real: Tensor) -> Tensor:
        """() with gradient to the heads alone: of features of the student's, without gradient, and real x0 (B, ...)."""
        with torch.no_grad():
            seen = self.features(real)
        heads = self.role.added["heads"]
        return self._own_loss(heads(seen), heads(fake))
