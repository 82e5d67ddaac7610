"""A number, and how far it may be off."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fewstep.eval.metrics.uncertainty import standard_error


@dataclass(frozen=True)
class Estimate:
    """value, and its standard error; one that is not a number is not known."""

    value: float
    error: float | None = None

    def __post_init__(self) -> None:
        if self.error is not None and math.isnan(self.error):
            object.__setattr__(self, "error", None)


def mean_of(values: Tensor) -> Estimate:
    """The mean of independent numbers (N,). Raises ValueError where there is none, or one that is not finite."""
    if not len(values) or not values.isfinite().all():
        raise ValueError("there is no number for every sample")
    return Estimate(values.double().mean().item(), standard_error(values))
