"""What a report holds, and what follows from it: the row to compare with, ratios, which numbers training optimised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fewstep.eval.report.measure import FRECHET, Measure

SCHEMA = 2
#: Groups that say nothing of the quality of a sample: how much samples vary, or what they resemble.
_BESIDE_QUALITY = ("diversity", "memorisation", "saturation")


@dataclass
class Content:
    """The fields of ``report.json``: docs/report.md says what each of them holds.

    Attributes:
        protocol: of :func:`fewstep.eval.report.protocol.protocol`.
        rows: one table per (model, step count), the teacher's first.
        measures: of every number in the rows' ``metrics``, in the order of the columns.
        num: samples in every row; None where joined reports have several numbers.
        seed: that the samples' own seeds are made of; None as above.
        conditions: ``kind`` of what samples are asked for ("prompt", "label", "item" or None); ``shown``: what each of
            a row's pictures was asked for.
        reference: what the samples are compared with, and its other floors; None where there is none.
        skipped: one sentence per number or row that is not there.
        notes: what a reader should know.
        settings: of the evaluation.
        versions: of the libraries.
        optimised: names of the measures that a student's training optimised, or by which its checkpoint was chosen.
        joined: where the rows come from, if they come from several reports.
    """

    protocol: dict[str, Any]
    rows: list[dict[str, Any]]
    measures: dict[str, Measure]
    num: int | None
    seed: int | None
    conditions: dict[str, Any] = field(default_factory=lambda: {"kind": None, "shown": []})
    reference: dict[str, Any] | None = None
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    optimised: list[str] = field(default_factory=list)
    joined: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.measures = {
            name: measure for name, measure in self.measures.items() if any(name in row["metrics"] for row in self.rows)
        }
        teacher = self.baseline()
        for row in self.rows:
            # Rows that were joined keep their ratios to the teacher of their own report.
            row.setdefault("relative", self._relative(row, teacher))

    def to_dict(self) -> dict[str, Any]:
        """The content of ``report.json``."""
        return {"schema": SCHEMA, **asdict(self)}

    @property
    def title(self) -> str:
        """Of its page."""
        return "Comparison" if self.joined else "Evaluation"

    def baseline(self) -> dict[str, Any] | None:
        """The teacher's row with the most steps, or None."""
        teachers = [row for row in self.rows if row["role"] == "teacher"]
        return max(teachers, key=lambda row: row["steps"], default=None)

    def principal(self, row: Mapping[str, Any] | None = None) -> str | None:
        """The measure, of those a row has, that its headline begins with: a Fréchet distance, else one of quality."""
        quality = [name for name in self.of_quality() if row is None or name in row["metrics"]]
        return next((name for name in quality if self.measures[name].group in FRECHET), next(iter(quality), None))

    def of_quality(self) -> list[str]:
        """The measures that say how good samples are, each alone or all of them."""
        return [
            name
            for name, measure in self.measures.items()
            if measure.better in ("lower", "higher") and measure.group not in _BESIDE_QUALITY
        ]

    def independent(self) -> list[str]:
        """The measures of quality that no student's training optimised."""
        return [name for name in self.of_quality() if name not in self.optimised]

    def has_diversity(self) -> bool:
        """Whether any row says how much the samples vary."""
        return any(measure.group == "diversity" for measure in self.measures.values())

    def _relative(self, row: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> dict[str, float]:
        ratios = {}
        for name, measure in self.measures.items():
            if not measure.has_floor or name not in row["metrics"]:
                continue
            ratios[f"{name}_to_floor"] = _ratio(row["metrics"][name], measure.floor)
            if teacher is not None:
                ratios[f"{name}_to_teacher"] = _ratio(row["metrics"][name], teacher["metrics"].get(name))
        return {name: value for name, value in ratios.items() if value is not None}


def _ratio(value: float, by: float | None) -> float | None:
    """Where it says something: an unbiased estimate of a distance may be below zero."""
    return value / by if by is not None and by > 0 else None
