"""The judge of images: an extractor, the reference it is compared with, and the metrics made from both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.eval.conditions import SampleConditions
from fewstep.eval.features import Extractor, Reference
from fewstep.eval.metrics.precision_recall import neighbour_distances
from fewstep.eval.metrics.table import Metric

#: Of the reference's samples, found together: precision asks for the third, density for the fifth.
_NEIGHBOURS = 5


@dataclass
class Judge:
    """An extractor and the reference it is compared with, whose neighbour radii are computed once.

    reference: None where there is nothing to compare with. training: features (m, d) of the images that the teacher
    learnt from, where they are told.
    """

    extractor: Extractor
    reference: Reference | None
    training: Tensor | None = None

    def __post_init__(self) -> None:
        self._neighbours: Tensor | None = None
        if self.reference is not None and self.extractor.sha256 != self.reference.extractor_sha256:
            raise ValueError(f"the reference {self.reference.name} was not made with {self.extractor.name}")

    def radii(self, k: int) -> Tensor:
        """Distances of the reference's samples to their k-th neighbours. Raises ValueError for statistics alone."""
        if self.reference is None or self.reference.features is None:
            raise ValueError("the reference has no samples of its own")
        if self._neighbours is None or self._neighbours.shape[1] < k:
            self._neighbours = neighbour_distances(self.reference.features, max(k, _NEIGHBOURS))
        return self._neighbours[:, k - 1]


@dataclass(frozen=True)
class MetricInputs:
    """What metrics are made of; each names what it needs of it (`fewstep.eval.metrics.table`).

    judge: of the view. column: what its extractor made of all samples, by name; (N, ...), or (N, parts, ...) where it
    looks at several frames or patches of each. conditions: what the samples were asked for.
    """

    judge: Judge
    column: Callable[[str], Tensor | None]
    conditions: SampleConditions

    @cached_property
    def _features(self) -> Tensor:
        found = self.column("features")
        if found is None:
            raise ValueError(f"{self.judge.extractor.name} does not look at these samples")
        return found

    @property
    def _parts(self) -> int:
        return self._features.shape[1] if self._features.ndim == 3 else 1

    @cached_property
    def features(self) -> Tensor:
        """Float (N, d); frames and patches count as samples."""
        return self._features.flatten(0, -2)

    @property
    def logits(self) -> Tensor | None:
        """Float (N, classes), or None where the extractor does not classify."""
        found = self.column("logits")
        return None if found is None else found.flatten(0, -2)

    @property
    def labels(self) -> Tensor | None:
        """The classes asked for, int64 (N,), or None where they are not known."""
        if not self.conditions.labels:
            return None
        return self.conditions.take_labels(range(len(self._features))).repeat_interleave(self._parts)

    @property
    def subjects(self) -> Tensor:
        """Which prompt or label each sample has, int64 (N,): zeros where all are asked for the same, or for nothing."""
        count = len(self._features)
        found = self.conditions.subjects(count)
        return (torch.zeros(count, dtype=torch.int64) if found is None else found).repeat_interleave(self._parts)

    @property
    def reference(self) -> Reference | None:
        """What the samples are compared with."""
        return self.judge.reference

    @property
    def reference_features(self) -> Tensor | None:
        """Of the reference's images, (n, d)."""
        return None if self.judge.reference is None else self.judge.reference.features

    @property
    def reference_radii(self) -> Callable[[int], Tensor]:
        """Neighbour radii of the reference's images by k, computed when they are first wanted."""
        return self.judge.radii

    @property
    def training_features(self) -> Tensor | None:
        """Of the images that the teacher learnt from, (m, d)."""
        return self.judge.training

    def lacking(self, needs: Sequence[str]) -> str | None:
        """Why something of `needs` is not there, or None where all is."""
        if self.column("features") is None:
            return f"{self.judge.extractor.name} takes images of another size"
        if "labels" in needs and self.labels is None:
            return "the classes of these samples are not known"
        if "logits" in needs and self.logits is None:
            return f"{self.judge.extractor.name} does not classify"
        if self.reference is None and {"reference", "reference_features", "reference_radii"} & set(needs):
            return "there is nothing to compare with (--reference)"
        if {"reference_features", "reference_radii"} & set(needs) and self.reference_features is None:
            return "the reference has statistics alone, and no images"
        if "training_features" in needs and self.training_features is None:
            return "the images that the teacher learnt from are not given (--train_data)"
        return None


def numbers_of(
    metrics: Sequence[Metric], inputs: MetricInputs
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """Metrics of one view: their numbers, the standard errors of some, and why others are not there, by group."""
    numbers: dict[str, float] = {}
    spread: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for metric in metrics:
        reason = inputs.lacking(metric.needs)
        if reason is None:
            try:
                estimates = metric.numbers(inputs)
            except ValueError as error:
                reason = str(error)
            else:
                numbers |= {name: one.value for name, one in estimates.items()}
                spread |= {name: one.error for name, one in estimates.items() if one.error is not None}
        if reason is not None:
            reasons[metric.group] = reason
    return numbers, spread, reasons
