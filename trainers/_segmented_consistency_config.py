"""What a run of segmented consistency is told (:mod:`fewstep.trainers.segmented_consistency`), and what papers say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from fewstep.config.checks import setting, settled
from fewstep.config.guidance import DrawnGuidanceConfig
from fewstep.critic.jumps import LOSSES
from fewstep.diffusion.discretization import EvenTimes, SigmaRange
from fewstep.diffusion.ode import SOLVERS
from fewstep.diffusion.segments import Stage, cut
from fewstep.errors import UserError
from fewstep.losses.consistency import DISTANCES

Number = TypeVar("Number", int, float)

#: The papers' choices by variant. How TSCD weighs its two losses in each stage is said in words alone ("MSE for 8 and 4
#: segments, the adversarial loss for 2 and 1"), and so is its offset noise: the numbers are our reading.
PAPERS: dict[str, dict[str, Any]] = {
    "tcd": {
        "segments": [1],
        "intervals": [50],
        "ends": "random",
        "distance": "pseudo_huber_elementwise",
        "distance_weight": [1.0],
        "adversarial_weight": [0.0],
        "adversarial_loss": "non_saturating",
        "offset_noise": 0.0,
    },
    "pcm": {
        "intervals": [40],
        "ends": "edge",
        "distance": "pseudo_huber_elementwise",
        "distance_weight": [1.0],
        "adversarial_weight": [0.0],
        "adversarial_loss": "hinge",
        "offset_noise": 0.0,
    },
    "tscd": {
        "segments": [8, 4, 2, 1],
        "intervals": [40],
        "ends": "random",
        "distance": "mse",
        "distance_weight": [1.0, 1.0, 1.0, 0.1],
        "adversarial_weight": [0.0, 0.0, 0.1, 1.0],
        "adversarial_loss": "non_saturating",
        "offset_noise": 0.1,
    },
}


@dataclass(kw_only=True)
class SegmentedConsistencyConfig(DrawnGuidanceConfig):
    """Consistency along a part of the trajectory: TCD, PCM and TSCD.

    Args:
        steps: the largest number of steps; a student of one segment makes all smaller numbers too.
        variant: tcd, pcm or tscd; what is not given is as in its paper.
        teacher_variant: of the teacher's weights, such as fp16; what other methods call --variant.
        segments: how many pieces the time is cut into in each stage, from many to few (tcd: [1], tscd: [8,4,2,1], pcm:
            as many as steps).
        stage_steps: training steps of each stage but the last, which goes on to the end; default equal shares.
        intervals: solver steps of the grid, of each stage or of all, divisible by its segments (tcd: 50; pcm, tscd: 40;
            PCM's SD 1.5 has 50 in 4 uneven phases).
        ends: where a jump ends: edge (of its segment, pcm) or random (anywhere below in its segment, tcd and tscd).
        solver: of the guided teacher's step: euler (DDIM for tables) or heun.
        distance: mse, l1, l2_norm, l2_norm_squared, pseudo_huber_norm or pseudo_huber_elementwise.
        huber_c: c of pseudo-Huber distances.
        distance_weight: of the distance in each stage (tscd: [1,1,1,0.1]).
        adversarial_weight: of the adversarial term in each stage (tscd: [0,0,0.1,1]; PCM's: 0.1, with 2 phases).
        adversarial_loss: hinge (pcm) or non_saturating (tscd).
        adversarial_lr: learning rate of the discriminator (PCM: 1e-5).
        alternate: student and discriminator are updated in turns, each in every second step (pcm), or both in each.
        offset_noise: how much noise a sample has in common in each channel (tscd: 0.1).
        target_decay: decay of the slow copy that is the target (0.95); 0 takes the student itself (with --lora_rank).
        renoise: how the student moves between steps: tcd (a part of the noise is drawn anew), ode, or auto: tcd for
            teachers of a table where it can ship, else ode. A student of several segments moves by the ODE.
        gamma: how much of the noise a step of --renoise tcd draws anew, in (0, 1]: eta of diffusers' TCDScheduler.
    """

    RENOISE: ClassVar[tuple[str, ...]] = ("auto", "ode", "tcd")

    steps: int = 8
    variant: str = "tcd"
    teacher_variant: str | None = setting("source", None)
    segments: list[int] | None = None
    stage_steps: list[int] | None = None
    intervals: list[int] | None = None
    ends: str | None = None
    solver: str = "euler"
    distance: str | None = None
    huber_c: float = 1e-3
    distance_weight: list[float] | None = None
    adversarial_weight: list[float] | None = None
    adversarial_loss: str | None = None
    adversarial_lr: float = 1e-5
    alternate: bool | None = None
    offset_noise: float | None = None
    target_decay: float | None = None
    gamma: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unknown("variant", *PAPERS)
        self.resolved()._check_resolved()

    def consequences(self) -> dict[str, Any]:
        """What the variant's paper says, the stages' lengths, and how such a student is sampled."""
        paper = {"segments": [self.steps], "alternate": self.variant == "pcm", **PAPERS[self.variant]}
        paper["target_decay"] = 0.0 if self.lora_rank else 0.95
        stages = len(self.segments or paper["segments"])
        # Papers' numbers are those of their own stages; of others the last are taken, which are those of few segments.
        for name in ("distance_weight", "adversarial_weight"):
            paper[name] = paper[name][-stages:]
        paper["stage_steps"] = [max(1, self.max_steps // stages)] * (stages - 1)
        follows = {name: value for name, value in paper.items() if getattr(self, name) is None}
        several = (self.segments or paper["segments"])[-1:] != [1] or (self.ends or paper["ends"]) == "edge"
        if several and self.renoise == "auto":
            follows["renoise"] = "ode"
        return super().consequences() | follows

    def _check_resolved(self) -> None:
        self._refuse_unknown("ends", "edge", "random")
        self._refuse_unknown("solver", *SOLVERS)
        self._refuse_unknown("distance", *DISTANCES)
        self._refuse_unknown("adversarial_loss", *LOSSES)
        self._refuse_negative("huber_c", "offset_noise", "adversarial_lr")
        if not 0 <= settled(self.target_decay) < 1:
            raise UserError(f"--target_decay must be in [0, 1), not {self.target_decay}")
        if not 0 < self.gamma <= 1:
            raise UserError(f"--gamma must be in (0, 1], not {self.gamma}; --renoise ode draws no noise")
        if "huber" not in settled(self.distance):
            self._refuse_set("belongs to the pseudo-Huber distances", "huber_c")
        self._check_stages()
        self._check_walk()

    def _check_stages(self) -> None:
        segments = settled(self.segments)
        if not segments or min(segments) < 1 or segments != sorted({*segments}, reverse=True):
            raise UserError(f"--segments go from many to few, such as [8,4,2,1], and not {segments}")
        for name in ("intervals", "distance_weight", "adversarial_weight"):
            given = getattr(self, name)
            if len(given) not in (1, len(segments)) or min(given) < 0:
                raise UserError(
                    f"--{name} {given} must be one number, or one for each of --segments {segments}, none negative"
                )
        for count, intervals in zip(segments, self.of_stages(settled(self.intervals)), strict=True):
            cut(range(intervals + 1), count)  # refuses a grid that the segments do not divide
        weights = zip(*(self.of_stages(getattr(self, f"{name}_weight")) for name in ("distance", "adversarial")))
        if any(one == other == 0 for one, other in weights):
            raise UserError("--distance_weight and --adversarial_weight are both 0 in a stage, which learns nothing")
        lengths = settled(self.stage_steps)
        if len(lengths) != len(segments) - 1 or any(length < 1 for length in lengths):
            raise UserError(f"--stage_steps {lengths} must be the steps of each of {len(segments)} stages but the last")
        if sum(lengths) >= self.max_steps:
            raise UserError(
                f"--max_steps {self.max_steps} end before the last of {len(segments)} stages begins, after the "
                f"--stage_steps {lengths}; give more steps, or shorter stages"
            )

    def _check_walk(self) -> None:
        last = settled(self.segments)[-1]
        if self.steps % last:
            raise UserError(
                f"--segments end at {last}, which do not divide --steps {self.steps}: a step would cross an edge that "
                f"no jump of the training crosses; take --steps {last}"
            )
        if self.ends == "edge" and self.steps != last:
            raise UserError(
                f"every jump of --ends edge goes to the end of one of {last} segments: a student of that makes {last} "
                f"steps, and not --steps {self.steps}"
            )
        if self.renoise == "ode":
            self._refuse_set("belongs to --renoise tcd, and this student moves by the ODE", "gamma")
        if not self.judged:
            self._refuse_set("belongs to the adversarial term: give --adversarial_weight", "adversarial_lr")
        if self.renoise == "tcd" and (last > 1 or self.ends == "edge"):
            raise UserError(
                "--renoise tcd jumps below the next step's time, beyond a segment's end: take --renoise ode, or one "
                "segment with --ends random"
            )

    def of_stages(self, values: Sequence[Number]) -> list[Number]:
        """The values of each stage, where one may stand for all."""
        count = len(settled(self.segments))
        return list(values) * count if len(values) == 1 else list(values)

    @property
    def judged(self) -> bool:
        """Whether some stage has an adversarial term."""
        return any(self.of_stages(settled(self.adversarial_weight)))

    @property
    def walk_gamma(self) -> float | None:
        return None if self.renoise == "ode" else self.gamma

    def stage_of(self, step: int) -> int:
        """The number of the stage that a step belongs to."""
        ends = [sum(settled(self.stage_steps)[: k + 1]) for k in range(len(settled(self.stage_steps)))]
        return sum(step >= end for end in ends)

    def make_stages(self, levels: SigmaRange, shift: float, visited: Sequence[float]) -> list[Stage]:
        """The grid and the segments of each stage.

        Args:
            levels: of the schedule.
            shift: of the student's grid.
            visited: every time at which the student is sampled, at any of its step counts.

        Raises:
            UserError: a table has not as many times as a grid.
        """
        stages = []
        for count, intervals in zip(settled(self.segments), self.of_stages(settled(self.intervals)), strict=True):
            even = EvenTimes(levels, [intervals + 1], shift)
            if len(even.times(0)) <= intervals:
                most = len(even.times(0)) - 1
                raise UserError(f"--intervals {intervals} are more than the times of the teacher's table; take {most}")
            edges = cut(even.times(0).tolist(), count)
            grid = EvenTimes(levels, [intervals + 1], shift, visited)
            stages.append(Stage(grid, edges.snapped(grid.times(0).tolist()), self.ends == "edge"))
        return stages
