"""What a SiD run is told (:mod:`fewstep.trainers.sid`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewstep.config.critic import AdversarialConfig, CriticConfig, CriticGuidanceConfig
from fewstep.config.times import NoiseLevelConfig
from fewstep.diffusion.schedule import FlowSchedule, NoiseSchedule
from fewstep.errors import UserError
from fewstep.losses.score_identity import WEIGHTINGS


@dataclass(kw_only=True)
class SidConfig(CriticConfig, NoiseLevelConfig, CriticGuidanceConfig, AdversarialConfig):
    """SiD, SiD-LSG, few-step SiD and SiDA (Zhou et al. 2024, 2025).

    Args:
        start: what a table teacher's student starts from: noise, marginal for noise times the first step's sigma, or
            auto: marginal with --first_timestep in one step or with --renoise ode, else noise.
        alpha: from 0 to 1.5 (paper: 1.2 for CIFAR-10 and ImageNet, else 1; at 0.5 the gradient is the Fisher
            divergence's own). Above 1 a student that is much wider than its teacher diverges.
        weighting: sid (1 / mean error of the teacher) or none; for flow teachers also 1_minus_sigma,
            1_minus_sigma_squared, 1_over_sigma, 1_over_sigma2, snr_sqrt, snr. auto: 1_minus_sigma for flow, else sid.
        normalizer_min: lower bound of the mean error in the weighting sid (default 1e-5).
        critic_updates: critic updates for each student update (papers: 1).
        critic_warmup_steps: steps before the student's first update.
        shared_walk: both turns of a step take one walk of the student to the step that is judged (papers: each its
            own), which saves the second; needs a critic that is told no negatives (--critic_dropout 0, or unguided).
    """

    start: str = "auto"
    alpha: float = 1.0
    weighting: str = "auto"
    normalizer_min: float | None = None
    critic_updates: int = 1
    critic_warmup_steps: int = 0
    shared_walk: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unknown("weighting", "auto", *WEIGHTINGS)
        self._refuse_negative("normalizer_min", "critic_warmup_steps")
        if not 0 <= self.alpha <= 1.5:
            raise UserError(f"--alpha must be in [0, 1.5], not {self.alpha}: beyond, the gradient points the wrong way")

    def consequences(self) -> dict[str, Any]:
        """What the student starts from."""
        below_the_top = self.first_timestep is not None and (self.steps == 1 or self.renoise == "ode")
        start = {"start": "marginal" if below_the_top else "noise"} if self.start == "auto" else {}
        return super().consequences() | start

    def weighting_for(self, schedule: NoiseSchedule) -> str:
        """The weighting that these settings mean for a teacher.

        Raises:
            UserError: it belongs to another family of teachers, or a setting to another weighting.
        """
        flow = isinstance(schedule, FlowSchedule)
        weighting = ("1_minus_sigma" if flow else "sid") if self.weighting == "auto" else self.weighting
        if weighting not in ("sid", "none") and not flow:
            raise UserError(f"--weighting {weighting} belongs to flow-matching teachers; take sid or none")
        if weighting != "sid":
            self._refuse_set(f"belongs to --weighting sid, and here it is {weighting}", "normalizer_min")
        return weighting
