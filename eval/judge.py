"""The judge of images: an extractor, the reference it is compared with, and the metrics made from both."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fewstep.eval.features import Extractor, Features, Reference
from fewstep.eval.generate import SampleConditions
from fewstep.eval.metrics.precision_recall import manifold_radii
from fewstep.eval.metrics.table import IMAGE_METRICS


@dataclass
class Judge:
    """An extractor and the reference it is compared with, whose neighbour radii are computed once."""

    extractor: Extractor
    reference: Reference

    def __post_init__(self) -> None:
        if self.extractor.sha256 != self.reference.extractor_sha256:
            raise ValueError(f"the reference {self.reference.name} was not made with {self.extractor.name}")

    @cached_property
    def radii(self) -> Tensor:
        """Neighbour radii of the reference, for precision."""
        return manifold_radii(self.reference.features)

    def fields(self, num: int) -> dict[str, Any]:
        """What has to travel with every number this judge gives, for `num` generated images."""
        return {
            "id": self.reference.name,
            "metric": self.reference.metric,
            "extractor": self.extractor.name,
            "weights_sha256": self.extractor.sha256,
            "resize": self.extractor.resize,
            "n_gen": num,
            "n_ref": len(self.reference.features),
            "image_format": "uint8, rounded half up",
            "floors": dict(self.reference.floors),
        }


@dataclass(frozen=True)
class MetricInputs:
    """What metrics are made of; each names what it needs of it (`fewstep.eval.metrics.table`).

    features: float (N, d). logits: float (N, classes), or None when the extractor does not classify. labels: int64
    (N,), the classes asked for, or None when unknown. The reference's are `reference`, `reference_features` (n, d) and
    `reference_radii` (n,).
    """

    judge: Judge
    features: Tensor
    logits: Tensor | None
    labels: Tensor | None

    @property
    def reference(self) -> Reference:
        """What the samples are compared with."""
        return self.judge.reference

    @property
    def reference_features(self) -> Tensor:
        """Of the real images."""
        return self.judge.reference.features

    @property
    def reference_radii(self) -> Tensor:
        """Neighbour radii of the real images, computed when they are first wanted."""
        return self.judge.radii

    def lacking(self, needs: Sequence[str]) -> str | None:
        """Why something of `needs` is not there, or None where all is."""
        if "labels" in needs and self.labels is None:
            return "the classes of these samples are not known"
        if "logits" in needs and self.logits is None:
            return f"{self.judge.extractor.name} does not classify"
        return None


def image_metrics(
    wanted: Sequence[str], parts: Sequence[Features], conditions: SampleConditions, judge: Judge | None
) -> tuple[dict[str, float], list[str]]:
    """The image metrics among `wanted`, and one plain sentence for each that could not be computed.

    parts: the features of samples 0, 1, 2, ... in order; empty when the images do not fit the extractor.
    """
    asked = [(metric, names) for metric in IMAGE_METRICS if (names := [n for n in metric.names if n in wanted])]
    if judge is None or not parts:
        unfit = "no embedded extractor knows these images" if judge is None else "the extractor takes another size"
        return {}, [f"{name} is skipped: {unfit}." for _, names in asked for name in names]
    features = torch.cat([part.features for part in parts])
    logits = [part.logits for part in parts if part.logits is not None]
    labels = conditions.take_labels(range(len(features))) if conditions.labels else None
    inputs = MetricInputs(judge, features, torch.cat(logits) if logits else None, labels)
    numbers: dict[str, float] = {}
    skipped: list[str] = []
    for metric, names in asked:
        reason = inputs.lacking(metric.needs)
        if reason is None:
            try:
                numbers |= {name: value for name, value in metric.numbers(inputs).items() if name in names}
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            skipped += [f"{name} is skipped: {reason}." for name in names]
    return numbers, skipped
