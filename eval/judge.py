"""The judge of images: an extractor, the reference it is compared with, and the metrics made from both."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fewstep.eval.config import METRICS
from fewstep.eval.features import Extractor, Features, Reference
from fewstep.eval.generate import SampleConditions
from fewstep.eval.metrics.agreement import agreement
from fewstep.eval.metrics.diversity import diversity
from fewstep.eval.metrics.frechet import frechet
from fewstep.eval.metrics.precision_recall import manifold_radii, precision_recall

IMAGE_METRICS = tuple(name for name in METRICS if name != "speed")


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


def image_metrics(
    wanted: Sequence[str], parts: Sequence[Features], conditions: SampleConditions, judge: Judge | None
) -> tuple[dict[str, float], list[str]]:
    """The image metrics among `wanted`, and one plain sentence for each that could not be computed.

    parts: the features of samples 0, 1, 2, ... in order; empty when the images do not fit the extractor.
    """
    names = [name for name in IMAGE_METRICS if name in wanted]
    if judge is None or not parts:
        reason = "no embedded extractor knows these images" if judge is None else "the extractor takes another size"
        return {}, [f"{name} is skipped: {reason}." for name in names]
    features = torch.cat([part.features for part in parts])
    logits = None if parts[0].logits is None else torch.cat([part.logits for part in parts])
    labels = conditions.take_labels(range(len(features))) if conditions.labels else None
    numbers: dict[str, float] = {}
    skipped: list[str] = []
    for name in names:
        try:
            if name == "fd_test":
                numbers[name] = frechet(features, judge.reference)
            elif name in ("agreement", "diversity") and labels is None:
                skipped.append(f"{name} is skipped: the classes of these samples are not known.")
            elif name == "agreement" and logits is None:
                skipped.append(f"{name} is skipped: {judge.extractor.name} does not classify.")
            elif name == "agreement":
                numbers[name] = agreement(logits, labels)
            elif name == "diversity":
                numbers[name] = diversity(features, labels, judge.reference)
            elif name not in numbers:
                found = precision_recall(features, judge.reference.features, reference_radii=judge.radii)
                numbers |= {metric: value for metric, value in zip(("precision", "recall"), found) if metric in names}
        except ValueError as error:
            skipped.append(f"{name} is skipped: {error}.")
    return numbers, skipped
