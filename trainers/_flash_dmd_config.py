"""What a Flash-DMD run is told (:mod:`fewstep.trainers.flash_dmd`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewstep.config.checks import setting, settled
from fewstep.config.critic import FollowingCriticConfig, ScoreConfig
from fewstep.config.reward import RewardConfig
from fewstep.critic.jumps import LOSSES
from fewstep.errors import UserError


@dataclass(kw_only=True)
class FlashDmdConfig(FollowingCriticConfig, ScoreConfig, RewardConfig):
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
        reward_weight: weight of the preference loss, whose updates are its own.
        reward_start_step: the step from which on preferences alternate with distillation, and whose student is the
            reference.
        preference_updates: updates by preferences for each one by distillation (paper: 5).
        preference_candidates: successors of a noisy step, of which the best and the worst are a pair (ours 4).
        preference_beta: how fast a lead over the reference is enough (Diffusion-DPO's 5000).
    """

    critic_updates: int = 2
    critic_follows_student: float = 0.97
    matched_steps: int | None = None
    gan_weight: float = 1e-3
    gan_loss: str = "non_saturating"
    discriminator_lr: float = 1e-4
    feature_extractor: str | None = setting("source", None)
    reward_weight: float = 1.0
    preference_updates: int = 5
    preference_candidates: int = 4
    preference_beta: float = 5000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_negative("gan_weight", "discriminator_lr", "preference_beta")
        self._refuse_below_one("preference_updates")
        self._check_preferences()
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
            self._refuse_set(
                "belongs to the GAN, which --gan_weight 0 turns off", "data", "feature_extractor", "gan_loss"
            )

    def _check_preferences(self) -> None:
        if self.preference_candidates < 2:
            raise UserError(f"--preference_candidates must be at least 2, not {self.preference_candidates}")
        if self.reward is None:
            names = ("preference_updates", "preference_candidates", "preference_beta")
            self._refuse_set("belongs to --reward, by which pictures are preferred", *names)
            return
        if self.steps < 2:
            raise UserError("--reward compares successors of a step, and a single step has none: give --steps 2")
        if self.renoise == "ode":
            raise UserError("--reward compares successors of a step, of which --renoise ode has one: give fresh")
        self._refuse_set("is of rewards with a gradient, and preferences have none", "reward_margin")

    def consequences(self) -> dict[str, Any]:
        """The noisier half of the steps is matched; successors to choose from need fresh noise."""
        follows: dict[str, Any] = {"matched_steps": max(1, self.steps // 2)} if self.matched_steps is None else {}
        if self.reward is not None and self.renoise == "auto":
            follows |= {"renoise": "fresh"}
        return super().consequences() | follows

    def prefers(self, step: int) -> bool:
        """Whether a step is one of preferences: so many, then one of distillation with its critic's, and again."""
        since = step - self.reward_start_step
        cycle = self.preference_updates + self.critic_updates
        return self.reward is not None and since >= 0 and since % cycle < self.preference_updates

    def student_moves(self, step: int) -> bool:
        """Whether a step of distillation is one of the student, too."""
        since = step - self.reward_start_step
        if self.reward is None or since < 0:
            return step % self.critic_updates == 0
        return since % (self.preference_updates + self.critic_updates) == self.preference_updates

    def learning_rate(self, role: str) -> float:
        """Of the student, the critic or the discriminator."""
        return self.discriminator_lr if role == "discriminator" else super().learning_rate(role)
