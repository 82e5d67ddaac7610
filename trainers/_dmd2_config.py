"""What a DMD2 run is told (:mod:`fewstep.trainers.dmd2`)."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.config.critic import FollowingCriticConfig
from fewstep.config.reward import RewardConfig
from fewstep.errors import UserError
from fewstep.losses.divergence import DIVERGENCES
from fewstep.trainers._dmd2_walks import ContinuousConfig, FirstStepConfig


@dataclass(kw_only=True)
class Dmd2Config(ContinuousConfig, FirstStepConfig, FollowingCriticConfig, RewardConfig):
    """DMD2 (Yin et al. 2024).

    Args:
        gan_weight: weight of the adversarial term in the student's loss (paper: 1e-3 to 5e-3); needs --data.
        gan_critic_weight: weight of the adversarial term in the critic's loss (paper: 1e-2).
        gan_features: whose features the GAN head sees: critic (the paper's: the critic learns to be told apart by), or
            teacher (FastGen's: the head alone learns, with an optimizer of its own, at fewer and cheaper passes).
        critic_loss: the critic's error in the space of its own output (native), or in x0 (x0, FastGen's for ImageNet).
        decoupled: Decoupled DMD's times: none (DMD2), hybrid (the method: what guidance adds is looked at no noisier
            than where the student was called, the match anywhere), full (both anywhere), constrained (neither noisier).
        decoupled_normalizer: what either term is normalised by: the guided teacher, or (one call less) the conditional.
        f_divergence: f-distill's: none, rkl (DMD2's), kl, js (the paper's), sf, sh, neyman, jf; needs --data.
        f_bins: bins of time in which f-distill's density ratio is normalised (paper: 0, off, or 10).
        f_momentum: what such a bin keeps of its old value (paper: 0, ImageNet 0.5).
        swiftbrush: SwiftBrush's gradient and critic: unnormalised, guided like the teacher, at times without condition.
    """

    f_divergence: str = "none"
    f_bins: int = 0
    f_momentum: float = 0.0
    decoupled: str = "none"
    decoupled_normalizer: str = "guided"
    gan_weight: float = 0.0
    gan_critic_weight: float = 1e-2
    gan_features: str = "critic"
    critic_loss: str = "native"
    swiftbrush: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unknown("decoupled", "none", "hybrid", "full", "constrained")
        self._refuse_unknown("decoupled_normalizer", "guided", "conditional")
        if self.decoupled == "none" and self.decoupled_normalizer != "guided":
            raise UserError("--decoupled_normalizer belongs to Decoupled DMD: give --decoupled, or leave it out")
        self._refuse_unknown("f_divergence", "none", *DIVERGENCES)
        self._refuse_unknown("gan_features", "critic", "teacher")
        self._refuse_unknown("critic_loss", "native", "x0")
        self._refuse_negative("f_bins", "gan_weight", "gan_critic_weight")
        if not 0 <= self.f_momentum < 1:
            raise UserError(f"--f_momentum must be in [0, 1), not {self.f_momentum}")
        if self.f_divergence == "none" and (self.f_bins or self.f_momentum):
            raise UserError("--f_bins and --f_momentum belong to f-distill: give --f_divergence, or leave them out")
        if self.f_momentum and not self.f_bins:
            raise UserError("--f_momentum is that of bins: give --f_bins, or leave it out")
        if self.has_head and self.data is None:
            what = "--gan_weight" if self.gan_weight > 0 else "--f_divergence"
            raise UserError(f"{what} needs real images: give --data, or leave the GAN out")
        if self.data is not None and not self.uses_data:
            raise UserError("--data is used by the GAN alone: give --gan_weight or --f_divergence, or leave it out")
        if self.gan_features != "critic" and not self.has_head:
            raise UserError("--gan_features belongs to the GAN: give --gan_weight or --f_divergence, or leave it out")
        if self.f_divergence != "none" and not self.gan_critic_weight:
            raise UserError("--f_divergence needs a trained GAN head: leave --gan_critic_weight above 0")
        if (self.decoupled != "none") + (self.f_divergence != "none") + self.swiftbrush > 1:
            raise UserError("--decoupled, --f_divergence and --swiftbrush are methods of their own: give one of them")
        if self.swiftbrush and (self.gan_weight or self.normalizer_min or self.critic_loss != "native"):
            raise UserError("--swiftbrush knows no --gan_weight, --normalizer_min or --critic_loss: leave them out")
        if self.normalizer != "x0" and (self.decoupled != "none" or self.swiftbrush):
            raise UserError("--normalizer is DMD2's own: leave it out with --decoupled and --swiftbrush")
        if self.off_trajectory and (self.f_divergence != "none" or self.swiftbrush):
            raise UserError("--off_trajectory knows neither --f_divergence nor --swiftbrush: leave one of them out")
        if self.diversity_weight and (self.schedule == "random" or self.off_trajectory):
            raise UserError("--diversity_weight teaches a fixed first step: leave out --schedule and --off_trajectory")
        if self.follow_after != "student" and self.critic_follows_student == 1:
            raise UserError("--follow_after belongs to --critic_follows_student: give that, or leave it out")

    @property
    def couples_samples(self) -> bool:
        """f-distill weighs a sample by the mean over the others."""
        return self.f_divergence != "none"

    @property
    def has_head(self) -> bool:
        """Whether the critic has a GAN head."""
        return self.gan_weight > 0 or self.f_divergence != "none"

    @property
    def uses_data(self) -> bool:
        """Whether real images are used."""
        return self.has_head
