"""What an MDT-dist run is told (:mod:`fewstep.trainers.mdt_dist`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.config.pairs import PairsWanted
from fewstep.config.teacher_pairs import TeacherPairsConfig
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.errors import UserError
from fewstep.losses.consistency import DISTANCES
from fewstep.losses.trig_flow import NORMALIZATIONS
from fewstep.networks.finite_difference import DERIVATIVES, FiniteDifference, finite_difference

TIME_WEIGHTS = ("none", "1-t")


@dataclass(kw_only=True)
class MdtDistConfig(TeacherPairsConfig):
    """MDT-dist (arXiv 2509.04406).

    Args:
        steps: of the sampler that the student is written with; the paper's students make 1 or 2.
        distillation_guidance: the teacher's guidance in velocity distillation; default guidance_scale, which is that of
            velocity matching. diffusers' convention: the paper's 40 and 100 are 41 and 101.
        matching_weight: of velocity matching.
        distillation_weight: of velocity distillation; 0 leaves it out.
        distillation_time_weight: none, as in the released code, or 1-t, which the exact gradient has.
        derivative: of the average velocity along the teacher's: backward (the code's discrete mode: one further call),
            exact (its continuous mode), central or renoise.
        derivative_step: of the differences, in flow time; under a table at least from one entry to the next.
        normalization: of that derivative alone: norm (g / (|g| + constant), over a sample, the code's), norm/sqrt(dim),
            clip or none (the paper's).
        normalization_constant: of it.
        distance: between the student's velocity and the target; mse, or any of consistency's without a constant.
        times: logit_normal (the code's) or uniform (the paper's).
        time_mean: mean of the normal of which a logit-normal time is the sigmoid.
        time_std: standard deviation of the same.
        time_min: the cleanest time, to which all times are scaled; default sigma_min, plus derivative_step of a
            difference that looks back.
        sigma_min: noise that is left in the clean sample.
    """

    steps: int = 2
    distillation_guidance: float | None = None
    matching_weight: float = 1.0
    distillation_weight: float = 1.0
    distillation_time_weight: str = "none"
    derivative: str = "backward"
    derivative_step: float = 0.01
    normalization: str = "norm"
    normalization_constant: float = 0.1
    distance: str = "mse"
    times: str = "logit_normal"
    time_mean: float = 1.0
    time_std: float = 1.0
    time_min: float | None = None
    sigma_min: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_data_beside_pairs()
        self._refuse_unknown("distillation_time_weight", *TIME_WEIGHTS)
        self._refuse_unknown("derivative", *DERIVATIVES)
        self._refuse_unknown("normalization", *NORMALIZATIONS)
        self._refuse_unknown("distance", *DISTANCES)
        self._refuse_unknown("times", "logit_normal", "uniform")
        self._refuse_negative("distillation_weight", "normalization_constant", "time_std", "distillation_guidance")
        if self.times == "uniform":
            self._refuse_set("belongs to logit-normal times (--times logit_normal)", "time_mean", "time_std")
        if not self.matching_weight > 0:
            raise UserError(
                f"--matching_weight must be positive, not {self.matching_weight}: distillation alone takes the student "
                "for what it is not yet, the average velocity of its own samples"
            )
        if not 0 < self.derivative_step < 0.5:
            raise UserError(f"--derivative_step is a time between 0 and 0.5, not {self.derivative_step}")
        if not 0 <= self.sigma_min < 0.5:
            raise UserError(f"--sigma_min must be in [0, 0.5), not {self.sigma_min}")
        if self.time_min is not None and not 0 < self.time_min < 1:
            raise UserError(f"--time_min must be between 0 and 1, not {self.time_min}")
        if not self.distillation_weight:
            belongs = "belongs to velocity distillation, which --distillation_weight 0 leaves out"
            self._refuse_set(belongs, "distillation_guidance", "distillation_time_weight")

    @property
    def pairs_wanted(self) -> PairsWanted | None:
        return None if self.data is not None else self._samples_wanted(guided=True)

    @property
    def differentiates(self) -> bool:
        """Whether the derivative is exact."""
        return self.derivative == "exact"

    def difference(self, schedule: NoiseSchedule, top: float) -> FiniteDifference | None:
        """What stands for the derivative where it is not exact; ``top``: the time at which the student starts."""
        if self.differentiates:
            return None
        return finite_difference(self.derivative, self.derivative_step, schedule, _flow_time(schedule, top))

    def span(self, schedule: NoiseSchedule, top: float) -> tuple[float, float]:
        """The cleanest and the noisiest flow time at which the student learns; ``top``: where it starts.

        Raises:
            UserError: there is nothing between both.
        """
        low = self.time_min
        if low is None:
            low = max(self.sigma_min, 1e-5) + (0.0 if self.differentiates else self.derivative_step)
        low, high = max(low, _flow_time(schedule, 0.0)), _flow_time(schedule, top)
        if not low < high:
            raise UserError(f"no time lies between --time_min {low:g} and {high:g}, where the student starts")
        return low, high


def _flow_time(schedule: NoiseSchedule, t: float) -> float:
    return float(schedule.flow_time(torch.tensor([t], dtype=torch.float64)))
