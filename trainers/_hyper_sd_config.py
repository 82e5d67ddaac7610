"""What a Hyper-SD run is told (:mod:`fewstep.trainers.hyper_sd`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewstep.config.checks import settled
from fewstep.config.critic import ScoreConfig
from fewstep.config.reward import RewardConfig
from fewstep.config.stages import read_stages
from fewstep.errors import UserError
from fewstep.trainers._segmented_consistency_config import SegmentedConsistencyConfig

#: In their order.
STAGES = ("tscd", "feedback", "score")


@dataclass(kw_only=True)
class HyperSdConfig(SegmentedConsistencyConfig, ScoreConfig, RewardConfig):
    """Hyper-SD (Ren et al. 2024, arXiv 2404.13686).

    Args:
        variant: of the trajectories: tscd, or tcd (one segment from the start).
        stages: which there are, each with its number of steps but the last, which lasts until --max_steps: tscd (the
            trajectories, whose own stages are --segments), feedback (--reward on one-step predictions), score (score
            distillation of one step); default three fifths of --max_steps, then equal shares.
        stage_steps: of the trajectories' own stages but the last; default equal shares of the stage tscd.
        trajectory_weight: of the trajectories' loss, which goes on in the later stages so that all step counts stay one
            student's; 0 leaves it out there.
        score_weight: of the matching's gradient in stage score; more serves one step and costs the others.
        gamma: as of the trajectories; at 1 (the released adapter's eta) all noise is drawn anew between steps, as it
            should be after stage score, whose one-step samples lie on no trajectory of the teacher.
        feedback_lr: learning rate of the student in stage feedback; default --lr.
        score_lr: learning rate of the student in stage score; default --lr.
    """

    variant: str = "tscd"
    stages: str | None = None
    trajectory_weight: float = 1.0
    score_weight: float = 0.05
    gamma: float = 1.0
    feedback_lr: float | None = None
    score_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unknown("variant", "tscd", "tcd")
        self._refuse_negative("trajectory_weight", "score_weight", "feedback_lr", "score_lr")
        starts = self.starts()
        lengths = settled(self.resolved().stage_steps)
        if "tscd" in starts and sum(lengths) >= self.trajectory_steps:
            raise UserError(
                f"--stage_steps {lengths} are those within stage tscd, which ends after {self.trajectory_steps} steps, "
                "before the last of them begins; give it more, or shorter ones"
            )
        if "feedback" in starts and self.reward is None:
            raise UserError("stage feedback learns from a reward: give --reward, or leave it out of --stages")
        for stage, names in (("feedback", ("feedback_lr",)), ("score", ("score_lr", "score_weight"))):
            if stage not in starts:
                self._refuse_set(f"belongs to stage {stage}: add it to --stages", *names)
        if self.reward is not None and not starts.keys() & {"feedback", "score"}:
            raise UserError("--reward is that of the stages feedback and score: add one to --stages, or leave it out")

    def consequences(self) -> dict[str, Any]:
        """As of the trajectories, whose own stages are within the first."""
        follows = super().consequences()
        if self.stage_steps is None:
            count = len(self.segments or follows["segments"])
            follows["stage_steps"] = [max(1, self.trajectory_steps // count)] * (count - 1)
            if "tscd" not in self.starts():  # a student that is brought by --init: what is left is its last stage
                follows["stage_steps"] = []
                last = {"segments": 1, "distance_weight": 1, "adversarial_weight": 1}
                follows |= {name: (getattr(self, name) or follows[name])[-kept:] for name, kept in last.items()}
        return follows

    def starts(self) -> dict[str, int]:
        """The first step of each stage, in their order.

        Raises:
            UserError: the stages are none, in another order, or one of them has no step.
        """
        if self.stages is not None:
            return read_stages(self.stages, STAGES, self.max_steps, "tscd:4000,feedback:1000,score")
        later = ["score"] if self.reward is None else ["feedback", "score"]
        each = 2 * self.max_steps // (5 * len(later))
        if each == 0:
            return {"tscd": 0}
        first = self.max_steps - each * len(later)
        return {"tscd": 0} | {name: first + each * place for place, name in enumerate(later)}

    def stage_at(self, step: int) -> tuple[str, int]:
        """The stage of a step, and the first step of that stage."""
        return next((name, first) for name, first in reversed(self.starts().items()) if first <= step)

    @property
    def trajectory_steps(self) -> int:
        """How many steps the stage of the trajectories has."""
        return next((first for name, first in self.starts().items() if name != "tscd"), self.max_steps)

    def rate(self, role: str, step: int) -> float:
        """The learning rate of a role in the stage of ``step``."""
        if role == "discriminator":
            return self.adversarial_lr
        if role != "student":
            return self.learning_rate(role)
        own = {"feedback": self.feedback_lr, "score": self.score_lr}.get(self.stage_at(step)[0])
        return self.lr if own is None else own

    @property
    def follows_max_steps(self) -> bool:
        """Where the stages are not given."""
        return self.stages is None
