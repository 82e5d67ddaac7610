"""What a MeanFlow run is told (:mod:`fewstep.trainers.mean_flow`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fewstep.config.checks import setting
from fewstep.config.pairs import PairsWanted
from fewstep.config.teacher_pairs import TeacherPairsConfig
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.diffusion.two_times import TwoTimes
from fewstep.errors import UserError
from fewstep.losses.mean_flow import WEIGHTINGS, alpha_at
from fewstep.networks.finite_difference import DERIVATIVES, FiniteDifference, finite_difference

VARIANTS = ("mean_flow", "alpha_flow", "improved")


#: What only logit-normal times know.
_LOGIT_NORMAL = ("time_mean", "time_std", "r_mean", "r_std")


@dataclass(kw_only=True)
class MeanFlowConfig(TeacherPairsConfig):
    """MeanFlow (Geng et al. 2025) and its relatives.

    Args:
        steps: the largest number of steps; one student makes all smaller numbers too.
        variant: mean_flow, alpha_flow (towards it by finite steps, whose share alpha falls from 1 to 0, where it is
            mean_flow), or improved (the derivative along the student's own velocity).
        teacher_variant: of the teacher's weights, such as fp16; what other methods call --variant.
        velocity: of the flow that is averaged: data (noise minus real image), teacher (guided), or auto: data where
            there is --data.
        renoise: a mean flow is an ODE; there is no other choice.
        kappa: how much of the guidance of a flow from data is the student's own, in [0, 1) (paper: 0, 0.5, 0.92;
            improved: 1 - 1/guidance_scale).
        omega: weight of the data's velocity in it; default guidance_scale * (1 - kappa), so that the student comes out
            guided by guidance_scale, in diffusers' convention.
        guidance_t_min: below this time a flow from data is not guided.
        guidance_t_max: and above this one (paper: 0.75 or 0.8).
        label_drop: share of samples without condition, where a flow from data is guided (paper: 0.1).
        apart: share of samples whose two times differ (paper: 0.25); the others are flow matching.
        times: how they are drawn: logit_normal, or uniform (mf-rae).
        time_mean: mean of the logit-normal times (paper: -0.4).
        time_std: standard deviation of the same.
        time_max: highest uniform time, before the shift (mf-rae: 0.999).
        r_mean: mean of the second times where they are drawn by themselves (CIFAR-10: -4), else both are sorted.
        r_std: standard deviation of the same; default time_std.
        time_shift: flow-matching shift of all times; 1 is none.
        time_min: the cleanest time that is trained.
        weighting: of a sample's squared error: sum (the paper's), sum_squared, mean, norm (sCM's) or uniform.
        weight_power: p of it (paper: 1).
        weight_constant: c of it (paper: 1e-3; with weighting sum it is compared with a sum over all entries).
        derivative: how it is taken: exact; or by differences, for networks that have none and for more memory: central
            (FastGen, mf-rae; two calls without a graph), backward (one call, less exact), renoise (central, along the
            line on which the sample was noised instead of the flow's velocity; not under a table).
        derivative_step: of the differences, in flow time (mf-rae: 5e-3, FastGen: 1e-4), under a table at least from one
            entry to the next; of renoise, a share of the time.
        tangent_warmup: steps until the derivative counts in full.
        alpha_first_step: alpha_flow: beginning of the sigmoid by which alpha falls; it leaves 1 at 29 % of the way.
        alpha_last_step: and its end; default the last step. alpha is 0 from 72 % of the way on.
        alpha_min: alpha_flow: where alpha stays instead of falling to 0, so that no step takes a derivative; that of a
            network which was trained at the times of a table alone is mostly noise.
        alpha_clamp: alpha_flow: its targets are clipped to this (with guidance: 4).
    """

    steps: int = 8
    variant: str = "mean_flow"
    teacher_variant: str | None = setting("source", None)
    velocity: str = "auto"
    renoise: str = "ode"
    kappa: float | None = None
    omega: float | None = None
    guidance_t_min: float = 0.0
    guidance_t_max: float = 1.0
    label_drop: float = 0.1
    apart: float = 0.25
    times: str = "logit_normal"
    time_mean: float = -0.4
    time_std: float = 1.0
    time_max: float = 1.0
    r_mean: float | None = None
    r_std: float | None = None
    time_shift: float | None = 1.0
    time_min: float = 1e-3
    weighting: str = "sum"
    weight_power: float = 1.0
    weight_constant: float = 1e-3
    derivative: str = "exact"
    derivative_step: float = 5e-3
    tangent_warmup: int = 0
    alpha_first_step: int = 0
    alpha_last_step: int | None = None
    alpha_min: float = 0.0
    alpha_clamp: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unknown("variant", *VARIANTS)
        self._refuse_unknown("velocity", "auto", "data", "teacher")
        self._refuse_unknown("weighting", *WEIGHTINGS)
        self._refuse_unknown("derivative", *DERIVATIVES)
        self._refuse_unknown("times", "logit_normal", "uniform")
        if self.renoise != "ode":
            raise UserError(f"--renoise must be ode for a mean flow, not {self.renoise!r}")
        self._refuse_negative("weight_power", "weight_constant", "omega", "tangent_warmup", "alpha_first_step")
        self._refuse_not_positive("time_std", "r_std", "time_shift", "alpha_clamp", "derivative_step")
        if not 0 < self.apart <= 1:
            raise UserError(f"--apart must be in (0, 1], not {self.apart}: without it nothing but the flow is learnt")
        if not 0 < self.time_min < 1:
            raise UserError(f"--time_min must be between 0 and 1, not {self.time_min}")
        if not self.time_min < self.time_max <= 1:
            raise UserError(f"--time_max must be above --time_min and at most 1, not {self.time_max}")
        if self.times == "uniform":
            self._refuse_set("belongs to logit-normal times (--times logit_normal)", *_LOGIT_NORMAL)
        else:
            self._refuse_set("belongs to uniform times (--times uniform)", "time_max")
            if self.r_mean is None:
                self._refuse_set("belongs to second times of their own: give --r_mean", "r_std")
        if self.variant != "alpha_flow":
            names = ("alpha_first_step", "alpha_last_step", "alpha_min", "alpha_clamp")
            self._refuse_set("belongs to --variant alpha_flow", *names)
        if self.derivative == "renoise" and self.variant == "improved":
            raise UserError("--derivative renoise and --variant improved each say along what; give one of them")
        if not self.derivative_step < 0.5:
            raise UserError(
                f"--derivative_step is a part of the time from 0 to 1, below 0.5, not {self.derivative_step}"
            )
        if not 0 <= self.alpha_min <= 1:
            raise UserError(f"--alpha_min must be in [0, 1], not {self.alpha_min}")
        if not 0 <= self.label_drop < 1:
            raise UserError(f"--label_drop must be in [0, 1), not {self.label_drop}")
        if self.kappa is not None and not 0 <= self.kappa < 1:
            raise UserError(f"--kappa must be in [0, 1), not {self.kappa}")
        if not 0 <= self.guidance_t_min < self.guidance_t_max <= 1:
            low, high = self.guidance_t_min, self.guidance_t_max
            raise UserError(f"--guidance_t_min and --guidance_t_max must be a range in [0, 1], not {low}, {high}")
        if self.derivative == "exact":
            self._refuse_set("belongs to differences, and --derivative exact takes none", "derivative_step")
        last = self.max_steps if self.alpha_last_step is None else self.alpha_last_step
        if self.variant == "alpha_flow" and last <= self.alpha_first_step:
            raise UserError(f"--alpha_last_step {last} must lie behind --alpha_first_step {self.alpha_first_step}")
        velocity = self.resolved().velocity
        if velocity == "data" and self.data is None:
            raise UserError("--velocity data is that of real images: give --data, or take --velocity teacher")
        if velocity == "teacher" and (self.kappa is not None or self.omega is not None):
            raise UserError("--kappa and --omega are the guidance of a flow from data; a teacher has --guidance_scale")
        if velocity == "teacher":
            guided = ("guidance_t_min", "guidance_t_max", "label_drop")
            self._refuse_set("belongs to a flow from data (--velocity data)", *guided)
        self._refuse_data_beside_pairs()

    def consequences(self) -> dict[str, Any]:
        """Whose velocity is averaged."""
        auto = {"velocity": "teacher" if self.data is None else "data"} if self.velocity == "auto" else {}
        return super().consequences() | auto

    def alpha(self, step: int) -> float:
        """alpha-Flow's share of the flow's own velocity; 0: the derivative is taken."""
        if self.variant != "alpha_flow":
            return 0.0
        last = self.max_steps if self.alpha_last_step is None else self.alpha_last_step
        return max(self.alpha_min, alpha_at(step, self.alpha_first_step, last))

    @property
    def pairs_wanted(self) -> PairsWanted | None:
        if self.data is not None:
            return None
        return self._samples_wanted(guided=True)

    @property
    def follows_max_steps(self) -> bool:
        """alpha-Flow's alpha, where its last step is not given."""
        return self.variant == "alpha_flow" and self.alpha_last_step is None

    @property
    def differentiates(self) -> bool:
        """Whether any step takes the exact derivative."""
        return self.derivative == "exact" and self.alpha(self.max_steps - 1) == 0

    def difference(self, schedule: NoiseSchedule, top: float) -> FiniteDifference | None:
        """What stands for the derivative, where it is not exact; ``top``: the time at which the student starts.

        Raises:
            UserError: it is none for a table.
        """
        if self.derivative == "exact":
            return None
        highest = float(schedule.flow_time(torch.tensor([top], dtype=torch.float64)))
        return finite_difference(self.derivative, self.derivative_step, schedule, highest)

    def two_times(self, schedule: NoiseSchedule, top: float) -> TwoTimes:
        """Where on the flow the student learns; ``top``: the time at which it starts."""
        # Flow times run from 0 to 1 under flow matching; under a table and EDM they end where the student starts.
        lowest, highest = schedule.flow_time(torch.tensor([0.0, top], dtype=torch.float64)).tolist()
        normals = (self.time_mean, self.time_std, self.r_mean, self.r_std)
        uniform = self.time_max if self.times == "uniform" else None
        low = max(self.time_min, lowest)
        return TwoTimes(schedule, low, highest, *normals, shift=self.time_shift or 1.0, uniform=uniform)

    def self_guidance(self, guidance_scale: float) -> tuple[float, float]:
        """(omega, kappa) of a flow from data; the student comes out guided by omega / (1 - kappa)."""
        kappa = self.kappa
        if kappa is None:
            kappa = 1 - 1 / guidance_scale if self.variant == "improved" and guidance_scale > 1 else 0.0
        return guidance_scale * (1 - kappa) if self.omega is None else self.omega, kappa
