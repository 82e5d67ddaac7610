"""The evaluation: students and their teacher, the same seeds and conditions, one row per model and step count."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from fewstep.data.durable import write_durably
from fewstep.errors import UserError
from fewstep.eval.cards import put_on_cards
from fewstep.eval.claim import claim
from fewstep.eval.comparing import Comparison, compare_with
from fewstep.eval.conditions import SampleConditions, conditions_of, with_trained_classes
from fewstep.eval.config import EvalConfig
from fewstep.eval.exporters import Sample, export
from fewstep.eval.features import Extractor
from fewstep.eval.generate import NonFiniteImagesError
from fewstep.eval.grid import GridRow, draw_grid
from fewstep.eval.judge import Judge
from fewstep.eval.known_rows import known_row
from fewstep.eval.lineup import line_up, own_steps, step_counts
from fewstep.eval.models import Model, in_steps
from fewstep.eval.panel import Panel, open_panel
from fewstep.eval.references import keep_statistics
from fewstep.eval.report import Report
from fewstep.eval.reporting import protocol_of, report_of
from fewstep.eval.rows import Row
from fewstep.eval.samples import SampleSet
from fewstep.eval.scorers import Scorer
from fewstep.eval.sources import ModelSource, unique_names
from fewstep.eval.speed import device_name
from fewstep.eval.timing import time_rows
from fewstep.training.distributed import Processes

logger = logging.getLogger(__name__)


def evaluate(
    students: Sequence[str | Path | Model | Any],
    config: EvalConfig | None = None,
    *,
    judge: Judge | None = None,
    extractors: Mapping[str, Extractor] | None = None,
    scorers: Mapping[str, Scorer] | None = None,
    processes: Processes | None = None,
    **options: Any,
) -> Report:
    """Measure students beside their teacher; write ``report.json``, ``report.md``, pictures into ``config.out``.

    Samples that were made are kept there, and used again by the next run of the same configuration, also where a
    process was killed in its middle. Several processes of a launch share the work, and give the same numbers.

    Args:
        students: folders, hub ids, pipelines of `fewstep.load`, or `Model` objects.
        config: what is measured; ``options`` are fields of it, over those of ``config``.
        judge: extractor and reference in the place of the embedded ones.
        extractors: networks in the place of the published ones, by kind ("inception", "dino", "clip").
        scorers: likewise, by the group of their numbers.
        processes: of the launch; every one of them calls this. Default: this one alone.

    Returns:
        the report, on every process.

    Raises:
        UserError: with one line, for whatever a caller can get wrong.
    """
    told = EvalConfig.with_options(config, options)
    return prepared(students, told, judge, extractors, scorers, processes).run()


def prepared(
    students: Sequence[str | Path | Model | Any],
    config: EvalConfig,
    judge: Judge | None = None,
    extractors: Mapping[str, Extractor] | None = None,
    scorers: Mapping[str, Scorer] | None = None,
    processes: Processes | None = None,
) -> Evaluation:
    """An evaluation whose settings are checked, before anything is made; arguments as of :func:`evaluate`."""
    models = line_up(students, config)
    fashion = any(model.embedded for model in models)
    if not fashion:
        config = with_trained_classes(config, models)
    conditions = [conditions_of(model, config, fashion) for model in models]
    skipped: list[str] = []
    counts = step_counts(models, config, skipped)
    if not any(counts):
        raise UserError("nothing could be evaluated: " + " ".join(skipped))
    known = fashion or any(one.kind == "prompt" and one.labels for one in conditions)
    comparison = compare_with(config, judge, known_clothes=known)
    panel = open_panel(
        config,
        fashion=judge is not None or known,
        prompted=any(one.prompted for one in conditions),
        holed=any(one.holed for one in conditions),
        extractors={**(extractors or {}), **({} if judge is None else {"fashion": judge.extractor})},
        scorers=scorers,
        unfit=comparison.unfit,
    )
    work = Evaluation(config, panel, comparison, processes or Processes())
    for model, asked, own in zip(models, conditions, counts):
        if comparison.kind == model.role == "teacher" and panel.extractors:  # its own row is the floor of all
            own = sorted({*own, own_steps(model, config)})
        work.add(model, asked, own)
    work.skipped += skipped
    return work


@dataclass
class Evaluation:
    """One evaluation, whose settings are checked.

    Args:
        config: of it.
        panel: who judges.
        comparison: what with.
        processes: that share the work.

    Attributes:
        sources: of the rows.
        skipped: one sentence for each row that is not there.
    """

    config: EvalConfig
    panel: Panel
    comparison: Comparison
    processes: Processes
    sources: list[ModelSource] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    _loaded: dict[int, Any] = field(default_factory=dict)

    def add(self, model: Model, conditions: SampleConditions, counts: Sequence[int]) -> None:
        """A model at some step counts."""
        self.sources += [self._source(model, conditions, steps, self.config.seed) for steps in counts]
        unique_names(self.sources)

    def run(self) -> Report:
        """Make the samples, then the numbers of all rows, then the timings. See :func:`evaluate`."""
        self.processes.of_main(lambda: claim(self.config.out, protocol_of(self.sources, self.config)))
        rows = []
        for source in self.sources:
            try:
                rows.append(self._row(source))
            except NonFiniteImagesError as error:
                self.skipped.append(f"{source.model.name} at {in_steps(source.steps)} is left out: {error}.")
        if not rows:
            raise UserError("nothing could be evaluated: " + " ".join(self.skipped))
        judges = self._judges(rows)
        return self.processes.of_main(lambda: self._finished(rows, judges))

    def _row(self, source: ModelSource) -> Row:
        known = None
        if not self.config.measure_teacher and self.comparison.kind == "fashion":
            known = known_row(source)
        few = source if known is None else dataclasses.replace(source, num=min(source.num, self.config.columns))
        return Row(source, self._samples(few), known)

    def _finished(self, rows: Sequence[Row], judges: Mapping[str, Judge]) -> Report:
        """What one process does for all: numbers, timings, report, pictures, cards."""
        for row in rows:
            row.measure(self.panel, judges)
        timings = self._timings(rows)
        report = report_of(rows, timings, self.panel, self.comparison, judges, self.config, self.skipped)
        try:
            report.save(self.config.out)
            keep_statistics(self.config.out, judges)
            self._draw(rows)
        except OSError as error:
            raise UserError(f"{self.config.out} could not be written ({error}); make room, start it again") from error
        for kind in self.config.export:
            for row in rows:
                self._export(kind, row)
        put_on_cards([row.source.model for row in rows], report)
        return report

    def _export(self, kind: str, row: Row) -> None:
        """A row's samples in a benchmark's layout, where they are not there already."""
        out = self.config.out / "exports" / kind / row.samples.name
        if out.is_dir():
            return
        source, paths = row.source, row.samples.picture_paths(row.source.num)
        prompts: Sequence[str | None] = source.prompts(range(source.num)) or [None] * source.num
        samples = (Sample(index, *one) for index, one in enumerate(zip(prompts, paths, strict=True)))
        told = self.config.export_prompts
        done = export(kind, samples, out, None if told is None else Path(told), source.name)
        logger.info("%s: %d samples in %s; %s", kind, done.samples, done.folder, " ".join((done.command, *done.notes)))

    def _timings(self, rows: Sequence[Row]) -> list[dict[str, Any] | None]:
        if "speed" not in self.panel.groups:
            return [None] * len(rows)
        teachers = [n for n, row in enumerate(rows) if row.source.model.role == "teacher"]
        baseline = max(teachers, key=lambda n: rows[n].source.steps, default=None)

        def load(source: ModelSource) -> Any:
            key = id(source.model)
            if key not in self._loaded:
                self._loaded[key] = self._load(source.model)
            return self._loaded[key]

        return [*time_rows([row.source for row in rows], load, self.config, baseline)]

    def _source(self, model: Model, asked: SampleConditions, steps: int, seed: int, label: str = "") -> ModelSource:
        def load() -> Any:
            if id(model) not in self._loaded:
                self._loaded.clear()  # one at a time, until they are timed side by side
                self._loaded[id(model)] = self._load(model)
            return self._loaded[id(model)]

        return ModelSource(model, asked, steps, self._num, seed, load, self._machine, label)

    def _load(self, model: Model) -> Any:
        return model.load(self.config.torch_device, getattr(torch, self.config.dtype))

    @cached_property
    def _num(self) -> int:
        """Samples in a row: where nobody looks at them, no more than are shown and timed."""
        if self.panel.extractors or self.panel.scorers:
            return self.config.num
        return min(self.config.num, max(self.config.columns, self.config.batch_size))

    @cached_property
    def _machine(self) -> tuple[str, ...]:
        """What the rounding of samples depends on."""
        return (device_name(self.config.torch_device), self.config.dtype)

    def _samples(self, source: Any, *, views: bool = True, what: str | None = None) -> SampleSet:
        """The complete samples of a source."""
        kept = source.num if self.config.images == "all" else self.config.columns
        looking = self.panel.views() if views else [v for v in self.panel.views() if v.kind in self.panel.extractors]
        samples = SampleSet(source, self.config.out, looking, kept, self.config.batch_size, self.processes)
        main = self.processes.rank == 0
        with tqdm(desc=what or source.title, unit="sample", disable=not main, delay=2) as bar:
            samples.complete(bar.update)
        return samples

    def _judges(self, rows: Sequence[Row]) -> dict[str, Judge]:
        """By the kind of extractor, each with what it compares with."""
        if not self.panel.extractors:
            return {}

        def of_teacher(seed: int) -> tuple[ModelSource, SampleSet]:
            teacher = next(source for source in self.sources if source.model.role == "teacher")
            steps = own_steps(teacher.model, self.config)
            source = self._source(teacher.model, teacher.conditions, steps, seed, "reference")
            return source, self._samples(source, views=False, what="reference")

        def of_images(source: Any) -> SampleSet:
            return self._samples(source, views=False, what=source.name)

        shape = rows[0].samples.shape
        return self.comparison.judges(self.panel, shape, of_teacher, of_images)

    def _draw(self, rows: Sequence[Row]) -> None:
        """``grid.png``."""
        columns = self.config.columns
        pictures = [GridRow(row.source.title, row.samples.pictures(columns)) for row in rows]
        # Column labels only where every row shows the same conditions.
        shown = {row.source.conditions for row in rows}
        asked = rows[0].source.conditions
        labels = asked.take(range(columns)) if len(shown) == 1 and asked.kind else []
        grid = draw_grid(pictures, [str(label) for label in labels])
        write_durably(self.config.out / "grid.png", lambda path: grid.save(path, format="PNG"))
