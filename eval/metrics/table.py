"""Every metric of images, one row each: the numbers it gives, the function that makes them, and what that needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.eval.metrics.agreement import agreement
from fewstep.eval.metrics.diversity import diversity
from fewstep.eval.metrics.frechet import frechet
from fewstep.eval.metrics.precision_recall import precision_recall


@dataclass(frozen=True)
class Metric:
    """One function of the samples that are judged.

    names: of its numbers, as a user asks for them and as reports call them. compute: takes what is in `needs`, in this
    order; returns a number, or as many as there are names; raises ValueError where it cannot be computed.
    needs: attributes of `fewstep.eval.judge.MetricInputs`. format: how its numbers are printed.
    """

    names: tuple[str, ...]
    compute: Callable[..., float | tuple[float, ...]]
    needs: tuple[str, ...]
    format: str = "{:.3f}"

    def numbers(self, inputs: Any) -> dict[str, float]:
        """Its numbers by name, of an object with the attributes that it needs. Raises ValueError as `compute`."""
        found = self.compute(*(getattr(inputs, need) for need in self.needs))
        values: Sequence[float] = found if isinstance(found, tuple) else (found,)
        return dict(zip(self.names, values, strict=True))


#: In the order of a report's columns. A metric is a file of this folder and a row here.
IMAGE_METRICS = (
    Metric(("fd_test",), frechet, ("features", "reference")),
    Metric(("agreement",), agreement, ("logits", "labels")),
    Metric(("precision", "recall"), precision_recall, ("features", "reference_features", "reference_radii")),
    Metric(("diversity",), diversity, ("features", "labels", "reference"), format="{:.2f}"),
)
