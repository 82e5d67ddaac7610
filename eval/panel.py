"""The panel that judges an evaluation: which extractors and scorers are asked for, are there, and can be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fewstep.errors import UserError
from fewstep.eval.config import EvalConfig
from fewstep.eval.extractors.kinds import open_extractor
from fewstep.eval.extractors.patches import PatchExtractor
from fewstep.eval.features import Extractor, FashionExtractor
from fewstep.eval.metrics.table import IMAGE_METRICS, METRICS, PRINCIPAL, SCORES, Metric, Score
from fewstep.eval.scorers import Scorer, open_scorer
from fewstep.eval.viewers import View, views_of
from fewstep.eval.weights import MissingWeightsError, Weights

#: What is measured of the embedded teachers' models where nothing is asked for: what needs no further file.
_FASHION = ("fd_test", "fd", "agreement", "prdc", "diversity", "kept", "saturation", "speed")
#: What only the embedded classifier gives.
_CLASSIFIED = ("fd_test", "fd", "agreement")


@dataclass
class Panel:
    """Who judges.

    Attributes:
        groups: of the metrics that are asked for, in the table's order.
        principal: the kind of extractor that stands for `PRINCIPAL`.
        extractors: by kind.
        scorers: by group.
        reasons: why an extractor (by kind) or a scorer (by group) that is asked for is not there.
        unfit: groups that mean nothing beside this reference, and why.
        asked: the user named the groups, and hears of each that cannot be measured.
    """

    groups: tuple[str, ...]
    principal: str
    extractors: dict[str, Extractor] = field(default_factory=dict)
    scorers: dict[str, Scorer] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    unfit: Mapping[str, str] = field(default_factory=dict)
    asked: bool = True

    def kind_of(self, metric: Metric) -> str:
        """The kind of extractor that a metric takes here."""
        return self.principal if metric.view == PRINCIPAL else metric.view

    @property
    def metrics(self) -> list[Metric]:
        """The rows of the table that are asked for and have their extractor."""
        return [m for m in self._rows() if self.kind_of(m) in self.extractors]

    @property
    def scores(self) -> list[Score]:
        """The scores that are asked for and have their scorer."""
        return [score for score in SCORES if score.group in self.scorers]

    def views(self) -> list[View]:
        """All that look at samples."""
        return views_of(self.extractors, self.scorers)

    def missing(self) -> dict[str, str]:
        """Why groups that are asked for have no extractor or scorer."""
        there = {m.group for m in self.metrics}
        lost = {m.group: self.reasons[self.kind_of(m)] for m in self._rows() if m.group not in there}
        return lost | {s.group: self.reasons[s.group] for s in SCORES if s.group in self.reasons}

    def _rows(self) -> list[Metric]:
        """Those of the table that are asked for; of several in one group, that of the principal view."""
        rows = [m for m in IMAGE_METRICS if m.group in self.groups and m.group not in self.unfit]
        shared = {m.group for m in rows if sum(n.group == m.group and n.names == m.names for n in rows) > 1}
        return [m for m in rows if m.group not in shared or self.kind_of(m) == self.principal]


def open_panel(
    config: EvalConfig,
    *,
    fashion: bool,
    prompted: bool,
    holed: bool = False,
    extractors: Mapping[str, Extractor] | None = None,
    scorers: Mapping[str, Scorer] | None = None,
    unfit: Mapping[str, str] | None = None,
) -> Panel:
    """Open what is asked for.

    Args:
        config: of the evaluation.
        fashion: the models' images are those of Fashion-MNIST.
        prompted: the samples are asked for by prompts.
        holed: they are asked for by pictures with a hole.
        extractors: to use in the place of the published networks, by kind.
        scorers: likewise, by group.
        unfit: groups that mean nothing beside this reference, and why.

    Raises:
        UserError: a file of weights is damaged, or, under ``strict``, not there.
    """
    given, told = dict(extractors or {}), dict(scorers or {})
    groups = config.metrics
    if groups is None:
        groups = _FASHION if fashion else [group for group in METRICS if group not in _CLASSIFIED]
        groups = [*groups, *(m.group for m in IMAGE_METRICS if m.view in given), *told]
    groups = tuple(group for group in METRICS if group in groups)
    principal = "fashion" if fashion else "dino"
    panel = Panel(groups, principal, unfit=unfit or {}, asked=config.metrics is not None)
    weights = Weights(config.weights, config.weights_sha256)
    for kind in dict.fromkeys(panel.kind_of(metric) for metric in panel._rows()):
        try:
            if kind in given:
                panel.extractors[kind] = given[kind]
            elif kind == "inception":
                name = kind if config.fid_mode == "clean" else f"{kind}-{config.fid_mode}"
                panel.extractors[kind] = open_extractor(name, weights, config.torch_device)
            elif kind == "patches":  # which nothing resizes
                inception = given.get("inception") or open_extractor("inception", weights, config.torch_device)
                panel.extractors[kind] = PatchExtractor(inception)
            elif kind != "fashion":
                panel.extractors[kind] = open_extractor(kind, weights, config.torch_device)
            elif fashion:
                panel.extractors[kind] = FashionExtractor(config.torch_device)
            else:
                panel.reasons[kind] = "the embedded classifier knows clothes alone"
        except MissingWeightsError as error:
            panel.reasons[kind] = str(error)
    for score in SCORES:
        if score.group not in groups:
            continue
        if score.reads_prompts and not prompted:
            panel.reasons[score.group] = "these samples are asked for without prompts"
            continue
        if score.reads_holes and not holed:
            if panel.asked:  # else it is no loss: nearly nothing has a hole
                panel.reasons[score.group] = "these samples are asked for without a picture and the mask of its hole"
            continue
        try:
            panel.scorers[score.group] = (
                told[score.group]
                if score.group in told
                else open_scorer(
                    score.group, weights, config.torch_device, panel.extractors.get("dino"), config.clip_model
                )
            )
        except MissingWeightsError as error:
            panel.reasons[score.group] = str(error)
    if config.strict and panel.missing():
        group, reason = next(iter(panel.missing().items()))
        raise UserError(f"{group} cannot be measured: {reason}")
    return panel
