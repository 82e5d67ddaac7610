"""One row of a report: a model at one step count, its samples and the numbers made of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fewstep.eval.judge import Judge, MetricInputs, numbers_of
from fewstep.eval.known_rows import KnownRow
from fewstep.eval.metrics.estimate import mean_of
from fewstep.eval.panel import Panel
from fewstep.eval.samples import SampleSet
from fewstep.eval.sources import ModelSource


@dataclass
class Row:
    """A row as it is measured.

    Attributes:
        source: its model and step count.
        samples: its own, complete; of a known row those alone that are shown.
        known: its numbers, where they need not be measured.
        metrics: numbers by name.
        spread: the standard errors of some of them.
        reasons: why a group of metrics is not among them.
    """

    source: ModelSource
    samples: SampleSet
    known: KnownRow | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def measure(self, panel: Panel, judges: Mapping[str, Judge]) -> None:
        """Make the numbers.

        Args:
            panel: who judges.
            judges: by the kind of their extractor.
        """
        if self.known is not None:
            asked = {name for metric in panel.metrics for name in metric.names}
            asked |= {name for score in panel.scores for name in score.names}
            self.metrics = {name: value for name, value in self.known.metrics.items() if name in asked}
            self.spread = {name: value for name, value in self.known.spread.items() if name in asked}
            return
        by_kind = defaultdict(list)
        for metric in panel.metrics:
            by_kind[panel.kind_of(metric)].append(metric)
        for kind, metrics in by_kind.items():

            def column(name: str, kind: str = kind) -> Any:
                return self.samples.column(kind, name)

            found = numbers_of(metrics, MetricInputs(judges[kind], column, self.source.conditions))
            self.metrics, self.spread = self.metrics | found[0], self.spread | found[1]
            self.reasons |= found[2]
        shape = self.samples.shape
        views = {view.kind: view for view in self.samples.views}
        for score in panel.scores:
            if (reason := views[score.group].refuses(shape)) is not None:
                self.reasons[score.group] = reason
                continue
            for name in score.names:
                values = self.samples.column(score.group, name)
                if values is None:
                    continue
                estimate = mean_of(values)
                self.metrics[name] = estimate.value
                if estimate.error is not None:
                    self.spread[name] = estimate.error

    def to_dict(self) -> dict[str, Any]:
        """As `Report.rows` has it, but for its speed and its pictures."""
        return {
            "model": self.source.model.name,
            "role": self.source.model.role,
            "steps": self.source.steps,
            "nfe": self.samples.evaluations if self.known is None else self.known.nfe,
            "num": self.source.num,
            "metrics": self.metrics,
            "spread": self.spread,
            "call": self.source.call,
            "speed": None,
        }
