"""What samples are compared with: the teacher's own samples, a folder of images, statistics, or Fashion-MNIST."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.eval.conditions import SampleConditions
from fewstep.eval.extractors.kinds import frechet_name
from fewstep.eval.features import Extractor, Reference
from fewstep.eval.judge import Judge, MetricInputs
from fewstep.eval.metrics.frechet import feature_statistics
from fewstep.eval.metrics.table import Metric
from fewstep.eval.samples import SampleSet
from fewstep.eval.stats_files import FeatureStatistics, read_stats, write_stats


def reference_of(
    name: str, extractor: Extractor, features: Tensor, conditions: SampleConditions | None = None
) -> Reference:
    """Of samples: features (N, d), or (N, parts, d) of which every part counts as one.

    Args:
        name: in words, for the report.
        extractor: that made the features.
        features: of all samples in their order.
        conditions: what they were asked for, where that is known.

    Raises:
        ValueError: fewer than two samples, or features that are not finite.
    """
    parts = features.shape[1] if features.ndim == 3 else 1
    flat = features.flatten(0, -2)
    mean, covariance = feature_statistics(flat)
    labels = None
    if conditions is not None and conditions.labels:
        labels = conditions.take_labels(range(len(features))).repeat_interleave(parts)
    return Reference(name, frechet_name(extractor), extractor.sha256, flat, labels, mean, covariance, len(flat))


def judges_of(
    name: str, samples: SampleSet, extractors: Sequence[tuple[str, Extractor]], conditions: SampleConditions | None
) -> dict[str, Judge]:
    """A judge for every extractor that looks at the reference's samples.

    Args:
        name: of the reference, in words.
        samples: its own.
        extractors: with their kinds.
        conditions: what the samples were asked for, where that is known.
    """
    judges = {}
    for kind, extractor in extractors:
        features = samples.column(kind, "features")
        if features is None:
            continue
        try:
            judges[kind] = Judge(extractor, reference_of(name, extractor, features, conditions))
        except ValueError as error:
            raise UserError(f"{name} cannot be compared with: {error}") from error
    return judges


def judge_of_statistics(path: Path, extractors: Mapping[str, Extractor]) -> dict[str, Judge]:
    """A judge that compares with a file of statistics, by the kind of the extractor that they were made with.

    A file that does not say its extractor is taken for one of Inception's, as EDM and clean-fid write them.

    Raises:
        UserError: it cannot be read, or none of the extractors made it.
    """
    found = read_stats(path)
    for kind, extractor in extractors.items():
        named = found.weights_sha256 == extractor.sha256 and found.resize in (None, extractor.resize)
        if named or (found.weights_sha256 is None and kind == "inception"):
            break
    else:
        raise UserError(
            f"the statistics of {path} are of {found.extractor or 'an Inception network'}, which judges nothing here"
        )
    if found.weights_sha256 is None:  # nothing of the file tells it, but their width can
        width = extractor(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).features.shape[-1]
        if len(found.mean) != width:
            raise UserError(
                f"the statistics of {path} are of {len(found.mean)} features, and {extractor.name} has {width}"
            )
    count = found.num or 0
    name = f"the statistics of {path.name}" + ("" if found.num is None else f", of {found.num:,} images")
    reference = Reference(
        name, frechet_name(extractor), extractor.sha256, None, None, found.mean, found.covariance, count
    )
    return {kind: Judge(extractor, reference)}


def keep_statistics(out: Path, judges: Mapping[str, Judge]) -> None:
    """Write ``stats/KIND.npz`` of every reference whose samples were seen: a later ``--reference``, for a thousandth.

    Raises OSError where the disk does not take it.
    """
    for kind, judge in judges.items():
        reference, extractor = judge.reference, judge.extractor
        if reference is None or reference.features is None:
            continue
        (out / "stats").mkdir(exist_ok=True)
        known = (reference.count, extractor.name, extractor.sha256, extractor.resize)
        write_stats(out / "stats" / f"{kind}.npz", FeatureStatistics(reference.mean, reference.covariance, *known))


def floors_of_halves(metrics: Sequence[Metric], judge: Judge) -> dict[str, float]:
    """What one half of the reference's images scores against the other, every second image in each; by name.

    Of half as many images, so a Fréchet distance is larger than all of them would give.
    """
    whole = None if judge.reference is None else judge.reference.features
    if judge.reference is None or whole is None or len(whole) < 4:
        return {}
    half = reference_of(judge.reference.name, judge.extractor, whole[1::2])
    inputs = MetricInputs(Judge(judge.extractor, half), {"features": whole[::2]}.get, SampleConditions())
    floors: dict[str, float] = {}
    for metric in metrics:
        if metric.floored and inputs.lacking(metric.needs) is None:
            try:
                floors |= {name: one.value for name, one in metric.numbers(inputs).items()}
            except ValueError:  # too few for this one: it has no floor, and the report says "-"
                continue
    return floors
