"""What each number of a report is, from who judged and what was compared with."""

from __future__ import annotations

from collections.abc import Mapping

from fewstep.eval.extractors.kinds import frechet_name
from fewstep.eval.judge import Judge
from fewstep.eval.metrics.table import Metric
from fewstep.eval.panel import Panel
from fewstep.eval.report.measure import Measure


def measures_of(
    panel: Panel, judges: Mapping[str, Judge], floors: Mapping[str, float], floor_of: str
) -> dict[str, Measure]:
    """Of every number that the rows may have, in the order of a report's columns.

    Args:
        panel: who judges.
        judges: by the kind of their extractor.
        floors: what samples of the reference's own kind score, by the number's name.
        floor_of: what those samples are, in words.
    """
    found: dict[str, Measure] = {}
    for metric in panel.metrics:
        judge = judges.get(panel.kind_of(metric))
        if judge is not None:
            for name in metric.names:
                found[name] = _of_metric(name, metric, judge, floors.get(name), floor_of)
    for score in panel.scores:
        scorer = panel.scorers[score.group]
        for name in score.names:
            found[name] = Measure(
                title=name if scorer.sha256 is None else f"{name} ({scorer.name})",
                group=score.group,
                format=score.format,
                better=score.better,
                scorer=scorer.name,
                weights_sha256=scorer.sha256,
                verified=scorer.verified,
            )
    return found


def _of_metric(name: str, metric: Metric, judge: Judge, floor: float | None, floor_of: str) -> Measure:
    extractor, reference = judge.extractor, judge.reference
    compares = reference is not None and bool({"reference", "reference_features"} & set(metric.needs))
    if floor is None and metric.floored and reference is not None and reference.floors:
        floor_of, floor = next(iter(reference.floors.items()))
    return Measure(
        title=_title(name, metric, judge),
        group=metric.group,
        format=metric.format,
        better=metric.better,
        extractor=extractor.name,
        weights_sha256=extractor.sha256,
        verified=extractor.verified,
        resize=extractor.resize,
        reference=reference.name if reference is not None and compares else None,
        n_ref=(reference.count or None) if reference is not None and compares else None,
        floor=floor if metric.floored else None,
        floor_of=(floor_of if floor is not None else "nothing of its own kind is there to compare")
        if metric.floored
        else None,
    )


def _title(name: str, metric: Metric, judge: Judge) -> str:
    if metric.group == "fd_test" and judge.reference is not None:
        return f"{judge.reference.metric} (test)"
    if metric.group in ("fid", "fd_dino", "fd"):
        return frechet_name(judge.extractor)
    return name
