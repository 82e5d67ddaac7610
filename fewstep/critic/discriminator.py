"""A discriminator without parameters of its own: means of the critic's features are its logits (SiDA; few-step SiD)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.config.critic import AdversarialConfig
from fewstep.losses.adversarial import clamped_cross_entropy, weighted_mean
from fewstep.networks.features import FeatureTap
from fewstep.networks.roles import Role


class CriticDiscriminator:
    """The critic, asked whether noised samples are real; its unguided features answer.

    Args:
        config: of the run.
        critic: trained to tell the two apart beside its denoising.
        tap: where its features are taken.
        total: sums tensors over processes in place, so that a batch is that of all of them.
    """

    def __init__(
        self,
        config: AdversarialConfig,
        critic: Role,
        tap: FeatureTap,
        total: Callable[[Iterable[Tensor]], None] | None = None,
    ) -> None:
        self.critic, self.tap, self.start_step, self.total = critic, tap, config.gan_start_step or 0, total
        #: SiDA averages over the batch before the samples' weights come in: micro-batches do not add up to their batch.
        self.over_batch = config.adversarial == "sida"
        # Both papers sum the main losses over a sample, and multiply the student's by 100. Of their adversarial losses
        # all but that of SiDA's critic are multiplied by the elements of a sample, which is a sum as well.
        student = 0.01 / 100 if self.over_batch else 1 / 100
        self.student_weight = student if config.gan_weight is None else config.gan_weight
        self._given_critic_weight = config.gan_critic_weight

    def critic_weight(self, shape: tuple[int, ...]) -> float:
        """Of the critic's adversarial loss beside its denoising of samples of this shape."""
        if self._given_critic_weight is not None:
            return self._given_critic_weight
        return 1 / math.prod(shape) if self.over_batch else 1.0

    def logits(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning) -> Tensor:
        """(B, n) logits for ``x_t`` (B, ...) at ``t`` (B,)."""
        return pooled_logits(self.critic.denoiser.features(x_t, t, conditioning, self.tap))

    def critic_loss(self, logits_real: Tensor, logits_fake: Tensor, weight: Tensor) -> Tensor:
        """Half the cross entropies of real and fake; logits (B, n), ``weight``: (B,), which SiDA has. Returns ()."""
        real, fake = clamped_cross_entropy(logits_real, real=True), clamped_cross_entropy(logits_fake, real=False)
        each = (real + fake) / 2
        return weighted_mean(each, weight, over_batch=True, total=self.total) if self.over_batch else each.mean()

    def student_loss(self, logits_fake: Tensor, weight: Tensor) -> Tensor:
        """The cross entropy of fake samples with the label "real"; logits (B, n), ``weight``: (B,). Returns ()."""
        each = clamped_cross_entropy(logits_fake, real=True)
        return weighted_mean(each, weight, self.over_batch, self.total)


def pooled_logits(features: Tensor) -> Tensor:
    """Logits (B, n) from features: means of maps (B, C, H, W) or (B, C, F, H, W) over C, of tokens (B, N, C) over N."""
    return features.mean(1).flatten(1)
