"""What an AnyFlow run is told (:mod:`fewstep.trainers.any_flow`)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.config.critic import ScoreConfig
from fewstep.config.pairs import PairsWanted
from fewstep.config.teacher_pairs import TeacherPairsConfig
from fewstep.diffusion.placed_times import PlacedTimes
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.errors import UserError
from fewstep.losses.flow_map import TIME_WEIGHTS
from fewstep.networks.finite_difference import FiniteDifference, finite_difference
from fewstep.reading import read_json, read_yaml

STAGES = ("both", "map", "on_policy")


@dataclass(kw_only=True)
class AnyFlowConfig(ScoreConfig, TeacherPairsConfig):
    """AnyFlow (arXiv 2605.13724): a flow map, and distribution matching through its own shortcuts.

    Args:
        steps: the largest number of steps; one student makes all smaller numbers too.
        stage: both, map (stage 1 alone) or on_policy (stage 2 alone, which goes on from the student of --init).
        map_steps: how many of --max_steps are stage 1's where the run has both (default 5/6 of them, as published).
        on_policy_lr: learning rate of stage 2; default --lr (paper: 5e-5, then 2e-6). --critic_lr follows it.
        velocity: of the flow that is mapped: teacher (guided), or data (noise minus sample, the authors' own form).
        map_guidance: guidance of the map; default --guidance_scale. With velocity data it is fused
            (authors: 3 in the map, 4 in the matching).
        renoise: a flow map is an ODE; there is no other choice.
        derivative: exact (in forward mode); or by differences, for networks that have none: central (the authors'; two
            passes), backward (one, less exact).
        derivative_step: of the differences, in flow time.
        equal_share: share of samples with r = t.
        zero_share: share of samples with r = 0.
        label_drop: share of samples without condition where data's velocity is guided.
        weighting: of the map's errors by time: beta08, gaussian or uniform.
        weight_power: p of the adaptive weight 1/(m + c)^p of a sample's mean squared error m, as in MeanFlow; default 1
            with velocity teacher (without it a map whose derivative is large diverges), and 0, none, with velocity
            data, where it would move the fixed point.
        weight_constant: c of it.
        rebalance: bring each sample whose times differ to the level of those whose times do not; default with velocity
            data, whose errors hold noise; a teacher's do not, and would be scaled away as they shrink.
        map_weight: weight of the map's loss beside distribution matching in stage 2; 0 is distribution matching alone.
        matching_weight: weight of distribution matching.
        rollout_steps: numbers of steps of the rollouts, one drawn in each turn; default 2, 4, 8, ... up to --steps
            (paper: [2, 4, 8, 16, 50]).
        segments: map steps of a rollout at most (paper: 3); default that, or the largest number of steps.
        critic_times: of the critic: logit_normal, or uniform like those at which it is compared.
        critic_time_mean: mean of the normal of which its times are the sigmoid before the shift.
        critic_time_std: standard deviation of the same.
    """

    steps: int = 8
    stage: str = "both"
    map_steps: int | None = None
    on_policy_lr: float | None = None
    velocity: str = "teacher"
    map_guidance: float | None = None
    renoise: str = "ode"
    derivative: str = "exact"
    derivative_step: float = 5e-3
    equal_share: float = 0.5
    zero_share: float = 0.25
    label_drop: float = 0.1
    weighting: str = "beta08"
    weight_power: float | None = None
    weight_constant: float = 1e-5
    rebalance: bool | None = None
    map_weight: float = 1.0
    matching_weight: float = 1.0
    rollout_steps: list[int] | None = None
    segments: int | None = None
    critic_times: str = "logit_normal"
    critic_time_mean: float = 0.0
    critic_time_std: float = 1.0
    critic_updates: int = 1
    time_min: float = 1e-3
    time_max: float = 1.0
    normalizer_min: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unknown("stage", *STAGES)
        self._refuse_unknown("velocity", "teacher", "data")
        self._refuse_unknown("derivative", "exact", "central", "backward")
        self._refuse_unknown("weighting", *TIME_WEIGHTS)
        self._refuse_unknown("critic_times", "logit_normal", "uniform")
        if self.renoise != "ode":
            raise UserError(f"--renoise must be ode for a flow map, not {self.renoise!r}")
        self._refuse_below_one("map_steps", "segments")
        self._refuse_negative("on_policy_lr", "map_weight", "matching_weight", "equal_share", "zero_share")
        self._refuse_negative("weight_power", "weight_constant")
        self._refuse_not_positive("derivative_step", "critic_time_std", "map_guidance")
        if self.critic_times == "uniform":
            names = ("critic_time_mean", "critic_time_std")
            self._refuse_set("belongs to logit-normal times (--critic_times logit_normal)", *names)
        if not self.derivative_step < 0.5:
            raise UserError(
                f"--derivative_step is a part of the time from 0 to 1, below 0.5, not {self.derivative_step}"
            )
        if self.derivative == "exact":
            self._refuse_set("belongs to differences, and --derivative exact takes none", "derivative_step")
        if not self.equal_share + self.zero_share <= 1:
            raise UserError(
                f"--equal_share and --zero_share are of one batch, and {self.equal_share} and {self.zero_share} are "
                "more than 1 together"
            )
        if not self.equal_share < 1:
            raise UserError("--equal_share must be below 1: without times that differ no map is learnt")
        if not 0 <= self.label_drop < 1:
            raise UserError(f"--label_drop must be in [0, 1), not {self.label_drop}")
        if self.rebalance and self.weight_power:
            raise UserError("--rebalance and --weight_power each scale a sample's error by itself; give one of them")
        self._check_stages()
        self._check_rollouts()
        self._check_samples()

    def _check_stages(self) -> None:
        if self.stage != "both":
            self._refuse_set("belongs to a run of both stages (--stage both)", "map_steps")
        if self.stage == "map":
            self._refuse_set("belongs to stage 2 (--stage both or on_policy)", "on_policy_lr", "critic_lr")
        elif not self.matching_weight > 0:
            raise UserError("--matching_weight 0 leaves stage 2 without its loss: take --stage map for the map alone")
        if self.stage == "both" and not 0 < self.first_on_policy_step < self.max_steps:
            raise UserError(
                f"--map_steps {self.first_on_policy_step} of --max_steps {self.max_steps} leave one of the two stages "
                "without a step; take --stage map or on_policy for one alone"
            )
        if self.stage == "on_policy" and self.init is None and not self.resume:
            raise UserError(
                "--stage on_policy goes on from a flow map: give --init, the run or student of --stage map, or take "
                "--stage both"
            )

    def _check_rollouts(self) -> None:
        if not self.rollouts or min(self.rollouts) < 1 or len({*self.rollouts}) < len(self.rollouts):
            raise UserError(f"--rollout_steps takes different numbers of steps, not {self.rollout_steps}")
        if self.segments is None:
            return
        if self.segments > 3:
            raise UserError(f"--segments must be at most 3, not {self.segments}: one step, what is before and after it")
        if self.segments > (largest := max(self.rollouts)):
            raise UserError(
                f"--segments {self.segments} are more than the {largest} steps of a rollout: give --rollout_steps (or "
                "--steps) of more, or fewer segments"
            )

    def _check_samples(self) -> None:
        self._refuse_data_beside_pairs()
        if not self.maps and (self.data is not None or self.pairs is not None):
            raise UserError(
                "--data and --pairs are used by the map's loss alone: leave --map_weight above 0, or them out"
            )
        if self.velocity == "data" and self.maps and self.data is None and self.pairs is None:
            raise UserError(
                "--velocity data is that of given samples: give --data or --pairs, or take --velocity teacher"
            )

    def consequences(self) -> dict[str, Any]:
        """The stages' bounds and rates, and the form of the loss, where they were not given."""
        auto: dict[str, Any] = {}
        if self.on_policy_lr is None and self.stage != "map":
            auto["on_policy_lr"] = self.lr
        rebalance = self.velocity == "data" and not self.weight_power if self.rebalance is None else self.rebalance
        auto["rebalance"] = rebalance
        if self.weight_power is None:
            auto["weight_power"] = 0.0 if rebalance or self.velocity == "data" else 1.0
        if self.stage == "both":
            auto["map_steps"] = self.first_on_policy_step
        auto["rollout_steps"] = list(self.rollouts)
        auto["segments"] = min(3, max(self.rollouts)) if self.segments is None else self.segments
        return super().consequences() | auto

    def refuse_wrong_order(self) -> None:
        """Raise ``UserError`` where --init comes from no flow map that stage 2 could go on from, or from a later stage.

        What is neither a run's folder nor a student's says nothing of itself here.
        """
        told = None if self.init is None else _told_of(Path(self.init))
        if told is None:
            return
        method, stage = told
        if self.stage == "on_policy" and method not in ("any_flow", "mean_flow"):
            raise UserError(
                f"--init {self.init} is of {method}, whose student has no second time: stage on_policy goes on from "
                "--stage map, or take --stage both"
            )
        if self.stage != "on_policy" and method == "any_flow" and stage in ("both", "on_policy"):
            raise UserError(
                f"--init {self.init} has been through stage on_policy, which comes after the map: give --stage "
                "on_policy to go on with it"
            )

    @property
    def first_on_policy_step(self) -> int:
        """The step at which stage 2 begins; past the last one where there is none."""
        if self.stage == "both":
            return round(self.max_steps * 5 / 6) if self.map_steps is None else self.map_steps
        return self.max_steps if self.stage == "map" else 0

    @property
    def rollouts(self) -> tuple[int, ...]:
        """The numbers of steps that rollouts have."""
        if self.rollout_steps is not None:
            return tuple(self.rollout_steps)
        return tuple(2**k for k in range(1, self.steps.bit_length())) or (1,)

    @property
    def maps(self) -> bool:
        """Whether any step has the map's loss."""
        return self.stage != "on_policy" or self.map_weight > 0

    @property
    def couples_samples(self) -> bool:
        """Rebalancing weighs a sample by the mean over others."""
        return self.maps and bool(self.resolved().rebalance)

    @property
    def follows_max_steps(self) -> bool:
        """Where the first stage ends, if that is not given."""
        return self.stage == "both" and self.map_steps is None

    @property
    def pairs_wanted(self) -> PairsWanted | None:
        if self.data is not None or not self.maps:
            return None
        return self._samples_wanted(guided=True)

    def rate(self, role: str, step: int) -> float:
        """The peak learning rate of a role in the stage of ``step``."""
        later = self.lr if self.on_policy_lr is None else self.on_policy_lr
        if role == "student":
            return later if step >= self.first_on_policy_step else self.lr
        return later if self.critic_lr is None else self.critic_lr

    def difference(self, schedule: NoiseSchedule, highest: float) -> FiniteDifference | None:
        """What stands for the derivative, where it is not exact; ``highest``: the noisiest flow time."""
        if self.derivative == "exact":
            return None
        return finite_difference(self.derivative, self.derivative_step, schedule, highest)

    def two_times(self, schedule: NoiseSchedule, top: float, shift: float) -> PlacedTimes:
        """Where on the flow the map is learnt; ``top``: the time at which the student starts."""
        # Flow times run from 0 to 1 under flow matching; under a table and EDM they end where the student starts.
        lowest, highest = schedule.flow_time(torch.tensor([0.0, top], dtype=torch.float64)).tolist()
        return PlacedTimes(schedule, max(self.time_min, lowest), highest, shift)


def _told_of(folder: Path) -> tuple[str, str | None] | None:
    """The method and the stage of a run's folder or of a student's; None where neither is said."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        settings = read_yaml(folder / "config.yaml")
        return str(settings["method"]), settings.get("stage")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        about = read_json(folder / "fewstep.json")
        return str(about["method"]), about["training"].get("stage")
    return None
