"""What a Flash-DMD run is told (:mod:`fewstep.trainers.flash_dmd`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewstep.config.checks import setting, settled
from fewstep.config.critic import FollowingCriticConfig, ScoreConfig
from fewstep.critic.jumps import LOSSES
from fewstep.errors import UserError


@dataclass(kw_only=True)
class FlashDmdConfig(FollowingCriticConfig, ScoreConfig):
    """Flash-DMD.

    Args:
        critic_updates: critic updates for each student update (paper: 1 or 2, since the critic follows the student).
        critic_follows_student: what the critic keeps of itself when the student has moved, l in C <- l C + (1 - l) S
            (unknown of the paper; SenseFlow's and LightX2V's 0.97); 1 is off.
        matched_steps: how many of the student's first steps are matched with the teacher's distribution; the pictures
            of all others are judged (unknown of the paper; default half of the steps).
        gan_weight: weight of the adversarial term in the student's loss (ours 1e-3); needs --data; 0 turns it off.
        gan_loss: non_saturating or hinge.
        discriminator_lr: learning rate of the discriminator's heads (unknown of the paper).
        feature_extractor: what the heads look through: a folder with a frozen vision network of transformers (the
            paper's SAM, or DINOv2, CLIP, ViT; safetensors), or a hub id that was fetched before; default a stand-in:
            the encoder of the teacher's autoencoder, and for teachers of pixels convolutions that were drawn once.
    """

    critic_updates: int = 2
    critic_follows_student: float = 0.97
    matched_steps: int | None = None
    gan_weight: float = 1e-3
    gan_loss: str = "non_saturating"
    discriminator_lr: float = 1e-4
    feature_extractor: str | None = setting("source", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_negative("gan_weight", "discriminator_lr")
        self._refuse_unknown("gan_loss", *LOSSES)
        matched, judged = settled(self.resolved().matched_steps), self.gan_weight > 0
        if judged and self.steps < 2:
            raise UserError("Flash-DMD matches the first steps and judges the last ones: give --steps 2 or more")
        if not 1 <= matched <= self.steps - judged:
            raise UserError(
                f"--matched_steps {matched} must be at least 1 and leave one of --steps {self.steps} to be judged"
            )
        if judged and self.data is None:
            raise UserError("--gan_weight needs real images: give --data, or --gan_weight 0")
        if not judged:
            for name in ("data", "feature_extractor"):
                self._refuse_set("belongs to the GAN, which --gan_weight 0 turns off", name)

    def consequences(self) -> dict[str, Any]:
        """The noisier half of the steps is matched."""
        matched = {"matched_steps": max(1, self.steps // 2)} if self.matched_steps is None else {}
        return super().consequences() | matched

    def learning_rate(self, role: str) -> float:
        """Of the student, the critic or the discriminator."""
        return self.discriminator_lr if role == "discriminator" else super().learning_rate(role)
