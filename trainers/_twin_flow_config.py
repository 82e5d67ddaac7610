"""What a TwinFlow run is told (:mod:`fewstep.trainers.twin_flow`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from fewstep.config.checks import settled
from fewstep.config.pairs import PairsWanted
from fewstep.config.teacher_pairs import TeacherPairsConfig
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.diffusion.signed_times import PARTS, BatchParts
from fewstep.diffusion.timesteps import WalkTimes
from fewstep.errors import UserError
from fewstep.losses.twin_flow import DISTANCES, WEIGHTINGS

#: Of samples in these parts of a batch the released code takes the plain velocity where --order is 0.
PLAIN_PARTS = ("mul", "flow", "adv")


@dataclass(kw_only=True)
class TwinFlowConfig(TeacherPairsConfig):
    """TwinFlow (arXiv 2512.05150): one network says the data's flow and, at negative times, that of its own samples.

    Args:
        steps: the largest number of steps; one student makes all smaller numbers too.
        sampler: how the student walks: any (each step is told where it ends, along the ODE), few (each step goes to
            the clean sample, which is noised anew) or mul (the velocity itself, for walks of many steps).
        last_time: flow time of few's last step, before which its steps are even, with a flow teacher (paper: 0.6 at two
            steps, the default there, and 0.5 at four, the default at more).
        renoise: follows from the sampler; there is no other choice.
        parts: of every batch, equal ones: e2e (the whole path at once), any (any step), mul (short steps), adv (the
            twin's velocity), one (to the clean sample from any time), flow (the velocity itself). A word that stands
            twice has twice the share. Without e2e there is no rectification, without adv no twin.
        order: network calls by which the student walks what its target leaves (paper: 2); 0 trains velocities alone.
        first_step: how far a target follows the velocity before the student's own walk, in flow time.
        target_clamp: a target is at most this far from what the student says, in every number; null is no bound.
        velocity: of the flow that is followed: data (noise minus sample), teacher (guided), or auto: data where there
            is --data.
        image_free: the student's own one-step samples take the place of data; velocity auto is then the teacher's.
        reference: who says what guidance adds to data's velocity: student (itself, without gradient; the target where
            there is one), the default, or frozen (the teacher). A teacher's velocity is the teacher's.
        enhanced_ratio: r of data's velocity + r (conditional - unconditional); default what brings the student to
            --guidance_scale w: 1 - 1/w by itself, w - 1 by the teacher (paper: 0.8 and 4), and 0 for the teacher's own
            samples, which are guided already.
        guidance_t_min: flow time at and below which nothing is guided.
        guidance_t_max: and at and above which. 1 leaves the whole path's part unguided, as published; 1.1 guides all.
        label_drop: share of samples without condition, where the student guides itself.
        mul_fraction: of t, how far mul's steps go at most.
        adversarial_weight: of the twin's part (paper: 1).
        match_weight: of rectification, which moves one-step samples by the difference of the two velocities (paper:
            0.5, image-free 0.75).
        distance: barron (paper), mse, l1, l2_norm, l2_norm_squared, pseudo_huber_norm or pseudo_huber_elementwise.
        distance_alpha: barron: 1 is the published one, 2 a square.
        distance_c: barron and pseudo-Huber: where they turn from a square to a norm.
        weighting: of a sample's error: gap (paper: 4 where the two times agree, 1 over the whole path), or uniform.
        target_decay: decay of a slow copy of the student that walks and guides in the targets; 0 takes the student
            itself. It grows to this from 0, as in the released code.
        time_min: the cleanest flow time that is trained.
    """

    steps: int = 4
    sampler: str = "any"
    last_time: float | None = None
    renoise: str = "ode"
    parts: list[str] | None = None
    order: int = 2
    first_step: float = 0.01
    target_clamp: float | None = 1.0
    velocity: str = "auto"
    image_free: bool = False
    reference: str | None = None
    enhanced_ratio: float | None = None
    guidance_t_min: float = 0.0
    guidance_t_max: float = 1.0
    label_drop: float = 0.1
    mul_fraction: float = 0.05
    adversarial_weight: float = 1.0
    match_weight: float | None = None
    distance: str = "barron"
    distance_alpha: float = 1.0
    distance_c: float = 1e-3
    weighting: str = "gap"
    target_decay: float = 0.0
    time_min: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unknown("velocity", "auto", "data", "teacher")
        if self.reference is not None:
            self._refuse_unknown("reference", "student", "frozen")
        self._refuse_unknown("distance", *DISTANCES)
        self._refuse_unknown("weighting", *WEIGHTINGS)
        self._check_sampler()
        self._refuse_negative("order", "enhanced_ratio", "adversarial_weight", "match_weight")
        self._refuse_not_positive("target_clamp", "distance_c")
        if self.distance != "barron":
            self._refuse_set("belongs to --distance barron", "distance_alpha")
            if "huber" not in self.distance:
                self._refuse_set("belongs to --distance barron and the pseudo-Huber ones", "distance_c")
        if not self.distance_alpha <= 2:
            raise UserError(f"--distance_alpha must be at most 2, which is a square, not {self.distance_alpha}")
        for name in ("first_step", "mul_fraction", "time_min"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"--{name} must be between 0 and 1, not {getattr(self, name)}")
        for name in ("label_drop", "target_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} must be in [0, 1), not {getattr(self, name)}")
        if not 0 <= self.guidance_t_min < self.guidance_t_max:
            low, high = self.guidance_t_min, self.guidance_t_max
            raise UserError(f"--guidance_t_min and --guidance_t_max must be a range, not {low}, {high}")
        self._check_parts()
        self._check_samples()

    def _check_sampler(self) -> None:
        self._refuse_unknown("sampler", "any", "few", "mul")
        if self.renoise not in ("ode", self.consequences().get("renoise")):
            raise UserError(
                f"--renoise follows from --sampler {self.sampler}: leave it out, and take --sampler few for fresh noise"
            )
        if self.last_time is None:
            return
        if self.sampler != "few" or self.steps < 2 or self.shift is not None or self.dynamic_shift != "static":
            raise UserError(
                "--last_time is of --sampler few with two steps and more, and without a shift; leave one of them out"
            )
        if not 0 < self.last_time < 1:
            raise UserError(f"--last_time must be between 0 and 1, not {self.last_time}")

    def _check_parts(self) -> None:
        parts = settled(self.resolved().parts)
        if not parts or not {*parts} <= {*PARTS}:
            raise UserError(f"--parts takes a list of {', '.join(PARTS)}, not {self.parts}")
        if not {*parts} - {"adv"}:
            raise UserError("--parts of adv alone train the twin and nothing that it is the twin of; add e2e or any")
        if self.matches and "adv" not in parts:
            raise UserError(
                "--parts with e2e but without adv rectify by a twin that is never trained; add adv, or give "
                "--match_weight 0"
            )
        for part, name in (("mul", "mul_fraction"), ("adv", "adversarial_weight")):
            if part not in parts:
                self._refuse_set(f"belongs to the part {part}, which --parts leaves out", name)
        if self.order == 0 and not {*parts} & {*PLAIN_PARTS}:
            raise UserError("--order 0 trains the parts mul, flow and adv alone, and --parts has none of them")

    def _check_samples(self) -> None:
        self._refuse_data_beside_pairs()
        if self.image_free and (self.data is not None or self.pairs is not None):
            raise UserError("--image_free trains on the student's own samples: leave out --data and --pairs")
        resolved = self.resolved()
        if resolved.velocity == "teacher":
            self._refuse_set("is added to data's velocity; a teacher has --guidance_scale", "enhanced_ratio")
            if self.reference == "student":
                raise UserError("--reference student is for --velocity data: leave it out, or take that")
        elif resolved.reference == "student" and (self.enhanced_ratio or 0.0) >= 1:
            raise UserError(
                f"--enhanced_ratio must be below 1 where the student guides itself, not {self.enhanced_ratio}: the "
                "guidance comes out as 1 / (1 - ratio); take --reference frozen, or a smaller one"
            )

    def consequences(self) -> dict[str, Any]:
        """Whose velocity is followed, the batch's parts, the weight of rectification, and the noise of walks."""
        auto: dict[str, Any] = {}
        if self.sampler == "few" and self.steps > 1:
            auto["renoise"] = "fresh"
        if self.velocity == "auto":
            auto["velocity"] = "teacher" if self.data is None else "data"
        if self.reference is None:
            auto["reference"] = "frozen" if auto.get("velocity", self.velocity) == "teacher" else "student"
        if self.parts is None:
            auto["parts"] = ["e2e", "mul", "any", "adv"]
        if self.match_weight is None:
            auto["match_weight"] = 0.75 if self.image_free else 0.5
        return super().consequences() | auto

    @property
    def walk_times(self) -> WalkTimes | None:
        """The paper's times of a flow student's walk, unless a shift is asked for: they start at pure noise in few."""
        if self.shift is not None or self.dynamic_shift != "static" or self.sampler == "any":
            return None
        if self.sampler == "mul":
            return WalkTimes(first=0.999, warp=(1.17, 0.8, 1.1))
        usual = 0.6 if self.steps == 2 else 0.5
        return None if self.steps == 1 else WalkTimes(last=usual if self.last_time is None else self.last_time)

    @property
    def matches(self) -> bool:
        """Whether there is rectification."""
        resolved = self.resolved()
        return settled(resolved.match_weight) > 0 and "e2e" in settled(resolved.parts)

    @property
    def pairs_wanted(self) -> PairsWanted | None:
        if self.data is not None or self.image_free:
            return None
        return self._samples_wanted(guided=True)

    def ratio(self, guidance_scale: float) -> float:
        """What guidance adds to data's velocity, times the difference of a reference's two answers."""
        if self.enhanced_ratio is not None:
            return self.enhanced_ratio
        if self.data is None or guidance_scale == 1:
            return 0.0
        return guidance_scale - 1 if self.reference == "frozen" else max(0.0, 1 - 1 / guidance_scale)

    def target_decay_at(self, step: int) -> float:
        """How slowly the target follows the student: d <- d + (1 - d) (decay - d) / 2 after each step, from 0."""
        return _grown(self.target_decay)[min(step, _GROWN - 1)]

    def batch_parts(self, schedule: NoiseSchedule, top: float) -> BatchParts:
        """How a batch is split and its times are drawn; ``top``: the time at which the student starts."""
        # Flow times run from 0 to 1 under flow matching; under a table and EDM they end where the student starts.
        lowest, highest = schedule.flow_time(torch.tensor([0.0, top], dtype=torch.float64)).tolist()
        low = max(self.time_min, lowest)
        return BatchParts(tuple(settled(self.parts)), low, highest, self.mul_fraction)


#: Steps after which a decay has grown to what it will be.
_GROWN = 5000


@lru_cache(maxsize=4)
def _grown(decay: float) -> tuple[float, ...]:
    found = [0.0]
    for _ in range(_GROWN - 1):
        found.append(found[-1] + (1 - found[-1]) * (decay - found[-1]) / 2)
    return tuple(found)
