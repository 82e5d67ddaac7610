"""What a consistency run is told (:mod:`fewstep.trainers.consistency`), and what each variant's paper says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fewstep.config.checks import setting, settled
from fewstep.config.guidance import DrawnGuidanceConfig
from fewstep.diffusion import ode
from fewstep.diffusion.discretization import (
    Discretization,
    EasyTimes,
    EvenTimes,
    LogNormalBins,
    SigmaRange,
    adaptive_decay,
    doubling_levels,
    progressive_levels,
)
from fewstep.errors import UserError
from fewstep.losses.consistency import DISTANCES, WEIGHTINGS, Boundary, hard_boundary, lcm_scalings

SOLVERS = ("none", *ode.SOLVERS)

#: The papers' choices by variant. A target_decay of None is CT's function of the step.
PAPERS = {
    "lcm": {
        "solver": "euler",
        "distance": "pseudo_huber_elementwise",
        "huber_c": 1e-3,
        "weighting": "uniform",
        "target_decay": 0.95,
        "intervals": 50,
    },
    "cd": {"solver": "heun", "distance": "mse", "weighting": "uniform", "target_decay": 0.95, "intervals": 39},
    "ct": {"solver": "none", "distance": "mse", "weighting": "uniform", "first_levels": 2, "last_levels": 150},
    "ict": {
        "solver": "none",
        "distance": "pseudo_huber_norm",
        "weighting": "1/(t-r)",
        "target_decay": 0.0,
        "first_levels": 10,
        "last_levels": 1280,
    },
    "ect": {
        "solver": "none",
        "distance": "pseudo_huber_norm",
        "huber_c": 0.0,
        "weighting": "1/(t-r)",
        "target_decay": 0.0,
    },
}


#: What only some variants know, and which these are; --intervals, which recipes have, may stand beside any.
_OWN = {
    "first_levels": ("ct", "ict"),
    "last_levels": ("ct", "ict"),
    "level_mean": ("ict", "ect"),
    "level_std": ("ict", "ect"),
    "ect_q": ("ect",),
    "ect_stage_steps": ("ect",),
    "ect_k": ("ect",),
    "ect_b": ("ect",),
}


@dataclass(kw_only=True)
class ConsistencyConfig(DrawnGuidanceConfig):
    """Consistency distillation and training.

    Args:
        variant: lcm or cd (distillation), ct, ict or ect (training from --data); what is not given is as in its paper.
        teacher_variant: of the teacher's weights, such as fp16; what other methods call --variant.
        solver: how the neighbour is reached: euler or heun (a step of the guided teacher's ODE), none (the same noise).
        distance: mse, l1, l2_norm, l2_norm_squared, pseudo_huber_norm or pseudo_huber_elementwise.
        huber_c: c of pseudo-Huber distances (lcm: 0.001, ict: 0.00054 times the root of a sample's size, ect: 0).
        weighting: uniform, karras, 1/(t-r), 1/sqrt(t-r), 1/c_out, 1/c_out^2, 1/sigma or 1/sigma^2, of noise levels.
        target_decay: decay of the slow copy that is the target (lcm, cd: 0.95; ct: a function of the step); 0 takes the
            student itself (ict, ect, and with --lora_rank).
        intervals: of the grid of lcm (50) or cd (39, which is 40 times).
        first_levels: number of noise levels at the start of ct (2) or ict (10).
        last_levels: and at the end (150, 1280).
        level_mean: mean of the logarithm of the noise levels of ict and ect.
        level_std: standard deviation of the same.
        ect_q: the gap between ect's two times shrinks by this factor with every stage.
        ect_stage_steps: steps of a stage of ect; default an eighth of the run.
        ect_k: k of ect's mapping n(t) = 1 + k sigmoid(-b t).
        ect_b: b of the same.
        guidance_min: with guidance_max: the teacher's guidance is drawn for each sample, in diffusers' convention (lcm:
            from 6 to 16), in the place of guidance_scale.
        guidance_max: see guidance_min.
        guidance_embedding: the network is told the drawn guidance; the student is sampled at any of that range.
    """

    steps: int = 8
    variant: str = "lcm"
    teacher_variant: str | None = setting("source", None)
    solver: str | None = None
    distance: str | None = None
    huber_c: float | None = None
    weighting: str | None = None
    target_decay: float | None = None
    intervals: int | None = None
    first_levels: int | None = None
    last_levels: int | None = None
    level_mean: float = -1.1
    level_std: float = 2.0
    ect_q: float = 2.0
    ect_stage_steps: int | None = None
    ect_k: float = 8.0
    ect_b: float = 1.0
    guidance_embedding: bool = False

    @property
    def embedded_guidance(self) -> tuple[float, float] | None:
        return self.guidance_range if self.guidance_embedding else None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unknown("variant", *PAPERS)
        for name, variants in _OWN.items():
            if self.variant not in variants:
                self._refuse_set(f"belongs to --variant {' or '.join(variants)}", name)
        self.resolved()._check_resolved()

    def consequences(self) -> dict[str, Any]:
        """What the variant's paper says, and how such a student is sampled."""
        paper = PAPERS[self.variant] | ({"target_decay": 0.0} if self.lora_rank else {})
        if (self.distance or paper["distance"]) == "pseudo_huber_elementwise":
            paper = {"huber_c": PAPERS["lcm"]["huber_c"]} | paper
        follows = {name: value for name, value in paper.items() if getattr(self, name) is None}
        if self.steps > 1 and self.renoise == "auto":
            follows["renoise"] = "fresh"
        return super().consequences() | follows

    def _check_resolved(self) -> None:
        self._refuse_unknown("solver", *SOLVERS)
        self._refuse_unknown("distance", *DISTANCES)
        self._refuse_unknown("weighting", *WEIGHTINGS)
        self._refuse_negative("huber_c", "ect_k")
        if self.target_decay is not None and not 0 <= self.target_decay < 1:
            raise UserError(f"--target_decay must be in [0, 1), not {self.target_decay}")
        self._refuse_below_one("intervals", "first_levels", "last_levels", "ect_stage_steps")
        if (self.first_levels or 0) > (self.last_levels or 0):
            raise UserError(f"--first_levels {self.first_levels} is more than --last_levels {self.last_levels}")
        if not self.level_std > 0 or not self.ect_q > 1:
            raise UserError(f"--level_std must be positive and --ect_q above 1, not {self.level_std}, {self.ect_q}")
        self._refuse_without_data_or_guidance()
        self._refuse_kept_noise()

    def _refuse_without_data_or_guidance(self) -> None:
        if self.solver == "none" and self.data is None:
            raise UserError(
                f"--variant {self.variant} trains on real images, without a teacher's step: give --data, "
                "or --solver euler for a teacher"
            )
        drawn = self.guidance_range
        if drawn is None:
            if self.guidance_embedding:
                raise UserError(
                    "--guidance_embedding needs the range to train in: give --guidance_min and --guidance_max"
                )
            return
        if self.solver == "none":
            raise UserError("--guidance_min is the teacher's guidance, and without --solver no teacher is asked")
        low, high = drawn
        if self.guidance_embedding and self.guidance_scale is not None and not low <= self.guidance_scale <= high:
            raise UserError(
                f"--guidance_scale {self.guidance_scale:g} is what the student is sampled at; "
                f"choose it from {low:g} to {high:g}"
            )

    def refuse_teacher(self, prediction_type: str, guided: bool, told: float | None) -> None:
        """Refuse a teacher that these settings do not fit.

        Args:
            prediction_type: of its network.
            guided: whether it has a negative conditioning to be guided away from.
            told: the guidance_scale that the student's network is told by default, None where it is told none.

        Raises:
            UserError: it does not fit.
        """
        drawn = self.guidance_range
        self.refuse_unguided(guided or told is not None)
        if drawn is not None and told is not None and not drawn[0] <= told <= drawn[1]:
            raise UserError(
                f"the student would be sampled at guidance_scale={told:g}, beyond --guidance_min and --guidance_max; "
                "give it a --guidance_scale between them"
            )
        if self.variant in ("ict", "ect") and prediction_type == "sample":
            raise UserError(
                f"--variant {self.variant} needs a network whose x0 comes close to x_t where there is little noise, "
                "and this one predicts x0 itself; take --variant lcm or cd"
            )

    @property
    def follows_max_steps(self) -> bool:
        """The curricula of CT and iCT, and ECT's where the length of its stages is not given."""
        return self.variant in ("ct", "ict") or (self.variant == "ect" and self.ect_stage_steps is None)

    @property
    def _levels(self) -> tuple[int, int]:
        """How many noise levels CT and iCT begin and end with."""
        return settled(self.first_levels), settled(self.last_levels)

    def target_decay_at(self, step: int) -> float:
        """How slowly the target follows the student; CT's decay grows with the number of noise levels."""
        if self.target_decay is not None:
            return self.target_decay
        return adaptive_decay(step, self.max_steps, *self._levels)

    def make_discretization(self, levels: SigmaRange, shift: float, visited: Sequence[float]) -> Discretization:
        """The variant's discretisation; every number that changes with the step is a plain function of it.

        Args:
            levels: of the schedule.
            shift: of the student's grid.
            visited: every time at which the student is sampled, at any of its step counts.
        """
        if self.variant == "ict":
            first, last = self._levels
            count = partial(doubling_levels, steps=self.max_steps, first=first, last=last)
            return LogNormalBins(levels, count, self.level_mean, self.level_std)
        if self.variant == "ect":
            stage_steps = self.ect_stage_steps or max(1, self.max_steps // 8)
            numbers = (self.ect_q, self.ect_k, self.ect_b, self.level_mean, self.level_std)
            return EasyTimes(levels, stage_steps, *numbers)
        if self.variant == "ct":
            first, last = self._levels
            count = partial(progressive_levels, steps=self.max_steps, first=first, last=last)
            return EvenTimes(levels, range(count(0), last + 2), shift, count=count)
        return EvenTimes(levels, [settled(self.intervals) + 1], shift, visited)

    def make_boundary(self, levels: SigmaRange, timestep_scaling: float | None) -> Boundary:
        """Where f is x_t itself: where LCMScheduler has it, else exactly at the lowest time.

        ECT needs none: at the clean end its target is the sample.

        Args:
            levels: of the schedule.
            timestep_scaling: of the scheduler that the student is shipped with; None where it is no LCMScheduler.
        """
        if timestep_scaling is not None:
            return lambda t: lcm_scalings(levels.schedule.timestep(t), timestep_scaling)
        return partial(hard_boundary, lowest=-math.inf if self.variant == "ect" else levels.lowest)
