"""Settings of DMD2's options that change where the student walks: DP-DMD's first step, and CDM's times."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.config.critic import ScoreConfig
from fewstep.critic.off_trajectory import PLACES
from fewstep.errors import UserError


@dataclass(kw_only=True)
class FirstStepConfig(ScoreConfig):
    """DP-DMD (arXiv 2602.03139): the first step keeps the teacher's diversity.

    Args:
        diversity_weight: DP-DMD's: weight of a first step that follows the teacher's path (paper: 0.05); 0 is off. The
            match then reaches all later steps and not that one; needs --renoise ode.
        diversity_teacher_steps: of the walk of the teacher whose beginning is followed (paper: 30).
        diversity_anchor_steps: how many of those are followed (paper: 5; its released script: 10).
        normalizer: what the matching gradient is divided by: the teacher's distance to x0 (DMD2), or to x_t (DP-DMD),
            which stays large for a good student.
    """

    diversity_weight: float = 0.0
    diversity_teacher_steps: int = 30
    diversity_anchor_steps: int = 5
    normalizer: str = "x0"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_negative("diversity_weight")
        self._refuse_below_one("diversity_teacher_steps", "diversity_anchor_steps")
        self._refuse_unknown("normalizer", "x0", "x_t")
        if not self.diversity_weight:
            names = ("diversity_teacher_steps", "diversity_anchor_steps")
            self._refuse_set("belongs to a first step that follows the teacher: give --diversity_weight", *names)
        if self.diversity_anchor_steps > self.diversity_teacher_steps:
            raise UserError("--diversity_anchor_steps are some of --diversity_teacher_steps: give no more than those")
        if self.diversity_weight and self.steps < 2:
            raise UserError("--diversity_weight teaches the first step, and --steps 1 has no other: give at least 2")
        if self.diversity_weight and self.renoise != "ode":
            raise UserError("--diversity_weight follows the ODE: give --renoise ode, or leave it out")


@dataclass(kw_only=True)
class ContinuousConfig(ScoreConfig):
    """CDM (arXiv 2605.06376): a student for any grid of times.

    Args:
        schedule: of the student's walk in training: fixed (its own grid), or random (CDM's: a grid drawn in each step).
        schedule_fewest: steps of a drawn grid at least (paper: 1; LightX2V: 2).
        schedule_most: steps of a drawn grid at most (paper: 28; LightX2V: 16).
        schedule_low: lowest time of a drawn grid after its first (paper: 0.25).
        schedule_high: highest time of a drawn grid after its first (paper: 0.95).
        off_trajectory: CDM's: weight of a further match where the student is asked once more, beside its walk (paper:
            1); 0 is off.
        off_trajectory_input: where that is: extrapolated (from a point of the walk along its velocity; the paper's),
            point (the point itself), or renoised (its prediction, noised).
        off_trajectory_teacher_time: at which time that is judged: independent (the paper's), or student.
        follow_after: whose update the critic's pull comes after: student (SenseFlow), or critic (CDM).
    """

    schedule: str = "fixed"
    schedule_fewest: int = 1
    schedule_most: int = 28
    schedule_low: float = 0.25
    schedule_high: float = 0.95
    off_trajectory: float = 0.0
    off_trajectory_input: str = "extrapolated"
    off_trajectory_teacher_time: str = "independent"
    follow_after: str = "student"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unknown("schedule", "fixed", "random")
        self._refuse_unknown("off_trajectory_input", *PLACES)
        self._refuse_unknown("off_trajectory_teacher_time", "independent", "student")
        self._refuse_unknown("follow_after", "student", "critic")
        self._refuse_negative("off_trajectory")
        self._refuse_below_one("schedule_fewest")
        if self.schedule_most < self.schedule_fewest:
            ends = self.schedule_fewest, self.schedule_most
            raise UserError(f"--schedule_fewest and --schedule_most must be a range, not {ends[0]}, {ends[1]}")
        if not 0 < self.schedule_low < self.schedule_high <= 1:
            raise UserError(
                "--schedule_low and --schedule_high must satisfy 0 < low < high <= 1, not "
                f"{self.schedule_low}, {self.schedule_high}"
            )
        if self.schedule == "fixed":
            names = ("schedule_fewest", "schedule_most", "schedule_low", "schedule_high")
            self._refuse_set("belongs to grids that are drawn: give --schedule random", *names)
        if not self.off_trajectory:
            how = ("off_trajectory_input", "off_trajectory_teacher_time")
            self._refuse_set("belongs to a match beside the walk: give --off_trajectory", *how)
