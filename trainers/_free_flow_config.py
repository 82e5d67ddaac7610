"""What a FreeFlow run is told (:mod:`fewstep.trainers.free_flow`)."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.config.critic import CriticConfig
from fewstep.errors import UserError


@dataclass(kw_only=True)
class FreeFlowConfig(CriticConfig):
    """FreeFlow (arXiv 2511.19428).

    Args:
        steps: 1: the student starts from noise alone.
        critic_updates: 1: the critic moves with the student.
        renoise: ode; nothing is noised between steps.
        correction: share of a micro-batch that is corrected by matching instead of predicted (paper: 0.25); 0: none.
        correction_scale: how strong the signal of matching is beside that of prediction (paper: 0.3 to 3).
        correction_t_max: above this flow time the teacher is not guided in the correction (paper: 0.7).
        match_min: lowest time at which teacher and critic are compared.
        match_max: and the highest.
        weight_power: of the weight on the prediction's gradient, 1 / (mean square + constant)^power (paper: 1).
        weight_constant: of the same.
        derivative: how the average velocity changes with the length of the step: difference (one call), or exact.
        derivative_step: of the difference, in flow time.
        time_mean: mean of the logit-normal flow times where steps end (paper: such that they are about 0.8).
        time_std: standard deviation of the same.
        time_min: the cleanest time at which the teacher is asked.
    """

    steps: int = 1
    critic_updates: int = 1
    renoise: str = "ode"
    correction: float = 0.25
    correction_scale: float = 1.0
    correction_t_max: float = 0.7
    match_min: float = 0.02
    match_max: float = 0.98
    weight_power: float = 1.0
    weight_constant: float = 1e-3
    derivative: str = "difference"
    derivative_step: float = 5e-3
    time_mean: float = 1.5
    time_std: float = 1.0
    time_min: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unknown("derivative", "difference", "exact")
        self._refuse_negative("weight_power", "weight_constant", "correction_scale", "time_std")
        if not self.correction:
            names = ("correction_scale", "correction_t_max", "match_min", "match_max")
            self._refuse_set("belongs to the correction, which --correction 0 leaves out", *names)
        if self.derivative == "exact":
            self._refuse_set("belongs to a difference, and --derivative exact takes none", "derivative_step")
        if self.data is not None:
            raise UserError("FreeFlow learns from noise alone: leave out --data, or take mf_rae or mean_flow")
        if self.steps != 1:
            raise UserError(f"FreeFlow's student knows steps from noise alone: --steps 1, not {self.steps}")
        if self.renoise != "ode":
            raise UserError(f"--renoise must be ode for a mean flow, not {self.renoise!r}")
        if self.critic_updates != 1:
            raise UserError("FreeFlow's critic moves once with its student: leave out --critic_updates")
        if not 0 <= self.correction < 1:
            raise UserError(f"--correction must be in [0, 1), not {self.correction}")
        if not 0 <= self.correction_t_max <= 1:
            raise UserError(f"--correction_t_max is a flow time in [0, 1], not {self.correction_t_max}")
        if not 0 < self.match_min < self.match_max <= 1:
            low, high = self.match_min, self.match_max
            raise UserError(f"--match_min and --match_max must satisfy 0 < min < max <= 1, not {low}, {high}")
        if not 0 < self.time_min < 0.5:
            raise UserError(f"--time_min must be between 0 and 0.5, not {self.time_min}")
        if not 0 < self.derivative_step < 0.1:
            raise UserError(f"--derivative_step must be between 0 and 0.1, not {self.derivative_step}")

    def parts(self, size: int) -> tuple[int, int]:
        """How many samples of a micro-batch are predicted, the first ones, and how many corrected, the last ones.

        Some of each; a single sample is both.
        """
        corrected = max(1, min(size - 1, round(self.correction * size))) if self.correction else 0
        return max(1, size - corrected), corrected

    @property
    def couples_samples(self) -> bool:
        """Their place in the micro-batch says which are corrected, and both signals are weighed in it."""
        return self.correction > 0
