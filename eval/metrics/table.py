"""Every metric, one row each: the numbers it gives, the function that makes them, and what that needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fewstep.eval.features import Reference
from fewstep.eval.metrics.agreement import agreement
from fewstep.eval.metrics.cmmd import cmmd
from fewstep.eval.metrics.diversity import diversity
from fewstep.eval.metrics.estimate import Estimate
from fewstep.eval.metrics.fd_infinity import fd_infinity
from fewstep.eval.metrics.frechet import frechet
from fewstep.eval.metrics.kid import kid
from fewstep.eval.metrics.memorisation import memorisation
from fewstep.eval.metrics.pair_diversity import pair_diversity
from fewstep.eval.metrics.prdc import density_coverage
from fewstep.eval.metrics.precision_recall import precision_recall

#: The view that tells images of a kind apart: the embedded classifier for its images, else DINOv2.
PRINCIPAL = "principal"
Better = Literal["lower", "higher", "near"]


@dataclass(frozen=True)
class Metric:
    """One function of what an extractor makes of the samples.

    group: what a user asks for. names: of its numbers, as reports call them. view: the kind of its extractor.
    compute: takes what is in `needs`, in this order; returns a number, an `Estimate`, or as many as there are names;
    raises ValueError where it cannot be computed. needs: attributes of `fewstep.eval.judge.MetricInputs`.
    format: how its numbers are printed. better: "lower", "higher", or "near" to the teacher's.
    floored: what samples of the reference's own kind score stands beside it.
    """

    group: str
    names: tuple[str, ...]
    view: str
    compute: Callable[..., Any]
    needs: tuple[str, ...]
    format: str = "{:.3f}"
    better: Better = "lower"
    floored: bool = False

    def numbers(self, inputs: Any) -> dict[str, Estimate]:
        """Its numbers by name, of an object with the attributes that it needs. Raises ValueError as `compute`."""
        found = self.compute(*(getattr(inputs, need) for need in self.needs))
        values: Sequence[Any] = found if isinstance(found, tuple) else (found,)
        estimates = [one if isinstance(one, Estimate) else Estimate(float(one)) for one in values]
        return dict(zip(self.names, estimates, strict=True))


@dataclass(frozen=True)
class Score:
    """A scorer's numbers, whose means over the samples are reported. Fields as of `Metric`.

    reads_prompts: it compares images with what they were asked for. reads_holes: with the picture whose hole they fill.
    """

    group: str
    names: tuple[str, ...]
    format: str = "{:.3f}"
    better: Better = "higher"
    reads_prompts: bool = False
    reads_holes: bool = False


def _prdc(features: Tensor, reference: Tensor, radii: Callable[[int], Tensor]) -> tuple[float, ...]:
    return (
        *precision_recall(features, reference, radii(3), k=3),
        *density_coverage(features, reference, radii(5), k=5),
    )


def _kid(features: Tensor, reference: Tensor) -> Estimate:
    return Estimate(*kid(features, reference))


def _pairs(features: Tensor, subjects: Tensor) -> Estimate:
    return Estimate(*pair_diversity(features, subjects))


def _infinity(features: Tensor, reference: Reference) -> Estimate:
    return Estimate(*fd_infinity(features, reference.mean, reference.covariance))


#: In the order of a report's columns. A metric is a file of this folder and a row here.
IMAGE_METRICS = (
    Metric("fd_test", ("fd_test",), "fashion", frechet, ("features", "reference"), floored=True),
    Metric("fd", ("fd",), "fashion", frechet, ("features", "reference"), floored=True),
    Metric("fid", ("fid",), "inception", frechet, ("features", "reference"), "{:.2f}", floored=True),
    Metric("fd_dino", ("fd_dino",), "dino", frechet, ("features", "reference"), "{:.1f}", floored=True),
    Metric("fd_infinity", ("fd_infinity",), PRINCIPAL, _infinity, ("features", "reference"), floored=True),
    Metric("patch_fid", ("patch_fid",), "patches", frechet, ("features", "reference"), "{:.2f}", floored=True),
    Metric("kid", ("kid",), "inception", _kid, ("features", "reference_features"), "{:.5f}", floored=True),
    Metric("cmmd", ("cmmd",), "clip", cmmd, ("features", "reference_features"), floored=True),
    Metric("agreement", ("agreement",), PRINCIPAL, agreement, ("logits", "labels"), better="higher"),
    Metric(
        "prdc",
        ("precision", "recall", "density", "coverage"),
        PRINCIPAL,
        _prdc,
        ("features", "reference_features", "reference_radii"),
        better="higher",
    ),
    Metric("diversity", ("diversity",), "fashion", diversity, ("features", "labels", "reference"), "{:.2f}", "near"),
    Metric("diversity", ("diversity",), "dino", _pairs, ("features", "subjects"), better="near"),
    Metric(
        "memorisation", ("memorisation",), PRINCIPAL, memorisation, ("features", "training_features"), better="near"
    ),
)
#: A scorer is a file of `fewstep.eval.scorers` and a row here.
SCORES = (
    Score("clip", ("clip",), reads_prompts=True),
    Score("pick", ("pick",), "{:.2f}", reads_prompts=True),
    Score("hps", ("hps",), "{:.2f}", reads_prompts=True),
    Score("aesthetic", ("aesthetic",), "{:.2f}"),
    Score("kept", ("kept",), "{:.4f}", reads_holes=True),
    Score("saturation", ("saturation", "contrast"), better="near"),
    Score("motion", ("motion", "motion_dino"), better="near"),
)
SPEED = "speed"
#: All that can be asked for.
METRICS = tuple(dict.fromkeys([*(m.group for m in IMAGE_METRICS), *(s.group for s in SCORES), SPEED]))
