"""Settings of methods that compare networks at times of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewstep.config.run import RunConfig
from fewstep.diffusion.noise_levels import NoiseLevels
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule
from fewstep.errors import UserError


@dataclass(kw_only=True)
class NoiseLevelConfig(RunConfig):
    """Settings of a method that compares networks at times of its own; the defaults are SiD's.

    Args:
        times: uniform or logit_normal; auto is logit_normal for flow teachers, else uniform.
        time_min: lowest uniform time (default 0.02; EDM: 0).
        time_max: highest uniform time (default 0.98; EDM: 0.8 of the ramp).
        time_shift: shift of uniform times of flow teachers, which are then clamped to these two.
        time_mean: of the normal of which a logit-normal time is the sigmoid (default ln 2).
        time_std: of that normal (default 1.6).
    """

    times: str = "auto"
    time_min: float | None = None
    time_max: float | None = None
    time_shift: float | None = None
    time_mean: float | None = None
    time_std: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unknown("times", "auto", "uniform", "logit_normal")
        self._refuse_negative("time_min", "time_std")
        self._refuse_not_positive("time_shift")

    def levels(self, schedule: NoiseSchedule) -> NoiseLevels:
        """The distribution that these settings mean for a teacher.

        Raises:
            UserError: a setting of another distribution or of another family of teachers, or bounds that are none.
        """
        flow = isinstance(schedule, FlowSchedule)
        kind = ("logit_normal" if flow else "uniform") if self.times == "auto" else self.times
        if kind == "logit_normal":
            self._refuse_set("belongs to uniform times (--times uniform)", "time_min", "time_max", "time_shift")
            return NoiseLevels(kind, mean=_given(self.time_mean, math.log(2)), std=_given(self.time_std, 1.6))
        self._refuse_set("belongs to logit-normal times (--times logit_normal)", "time_mean", "time_std")
        if not flow:
            self._refuse_set("belongs to flow-matching teachers", "time_shift")
        low, high = (0.0, 0.8) if isinstance(schedule, EDMSchedule) else (0.02, 0.98)
        low, high = _given(self.time_min, low), _given(self.time_max, high)
        if not low < high <= 1:
            raise UserError(f"--time_min and --time_max must satisfy min < max <= 1, not {low}, {high}")
        return NoiseLevels(kind, low, high, self.time_shift)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
