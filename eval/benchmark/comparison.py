"""All methods side by side: one table and one picture, made from the results that are kept."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import UserError
from fewstep.eval.benchmark.cell_results import Result, read_result, read_strip, why_stale
from fewstep.eval.benchmark.cells import TEACHER, Cell
from fewstep.eval.grid import GridRow, draw_grid
from fewstep.eval.models import in_steps
from fewstep.eval.scorers.kept import picture_and_hole
from fewstep.fashion import TEACHERS, looking
from fewstep.fashion.items import inpainting_items
from fewstep.programs.planning.call_counts import Calls, forward_passes

#: How many times lower than its teacher's, at the same step count, a student's FD is to be.
AT_LEAST = {1: 1.6, 2: 1.3, 4: 1.0}
#: How many times the FD of the teacher at its own steps the best student may have, at these step counts.
AT_MOST, BEST_AT = 1.1, (1, 4)
#: The same of a teacher that is shown a picture, where anything is asked but to be better than it at as many steps.
AT_MOST_SHOWN = {1: 1.6}
#: How much less of its picture than its teacher at its own steps a student may keep.
KEPT_WITHIN = 0.02
SHORT = "†"
PICTURE_CELL = 32
_HOLE = 128
_TITLES = (
    "method",
    "teacher",
    "steps",
    "NFE",
    "FD",
    "better than its teacher",
    "over the teacher at {most}",
    "agreement",
    "recall",
    "seeds",
    "training steps",
    "passes",
    "CPU s",
)
# Where the table stands in a document.
_BEGIN, _END = "<!-- methods: make methods writes from here -->", "<!-- methods: to here -->"


@dataclass(frozen=True)
class Row:
    """One cell over its seeds.

    Args:
        cell: of the first seed.
        results: of each seed.
    """

    cell: Cell
    results: Sequence[Result]

    @property
    def name(self) -> str:
        """Of the method or variant, or the teacher's word."""
        return TEACHER if self.cell.training is None else self.cell.training.name

    def median(self, metric: str) -> float:
        """Over the seeds."""
        return statistics.median(result.metrics[metric] for result in self.results)

    @property
    def fd(self) -> float:
        """Median over the seeds."""
        return self.median("fd_test")

    @property
    def passes(self) -> float:
        """What the first seed's training cost, in forward passes of one sample."""
        return forward_passes({role: Calls(**calls) for role, calls in self.results[0].calls.items()})

    @property
    def gated(self) -> bool:
        """Whether something is claimed of it."""
        return self.cell.training is not None and self.cell.training.gated

    @property
    def shown(self) -> bool:
        """Whether it is shown a picture with a hole, of which it is to keep what is given."""
        return looking(self.cell.teacher)


@dataclass(frozen=True)
class Comparison:
    """The rows that there are, each teacher's before its students'.

    Raises:
        UserError: two rows were judged by unlike numbers of samples.
    """

    rows: Sequence[Row]

    def __post_init__(self) -> None:
        if len({result.num for row in self.rows for result in row.results}) > 1:
            raise UserError("the results are of unlike numbers of samples, which cannot be compared: run all with one")

    def teacher(self, name: str, steps: int | None = None) -> Row | None:
        """A teacher's row, by default that of the steps that it is called with; None where it was not measured."""
        wanted = TEACHERS[name].steps if steps is None else steps
        found = [row for row in self.rows if row.cell.training is None and row.cell.teacher == name]
        return next((row for row in found if row.cell.steps == wanted), None)

    @property
    def most(self) -> str:
        """The steps that the teachers are called with, in words."""
        return " or ".join(map(str, sorted({TEACHERS[row.cell.teacher].steps for row in self.rows})))

    def students(self, gated: bool = False) -> list[Row]:
        """The rows with a training; of those something is claimed of, if asked for."""
        return [row for row in self.rows if row.cell.training is not None and (row.gated or not gated)]

    def better(self, row: Row) -> float | None:
        """How many times lower the FD is than the teacher's at as many steps, where that was measured."""
        teacher = self.teacher(row.cell.teacher, row.cell.steps)
        return None if teacher is None else teacher.fd / row.fd

    def over(self, row: Row) -> float | None:
        """The FD over that of the teacher at its own steps, where that was measured."""
        teacher = self.teacher(row.cell.teacher)
        return None if teacher is None else row.fd / teacher.fd

    def falls_short(self, row: Row) -> bool:
        """Whether a student is not as much better than its teacher as is asked of it."""
        better = self.better(row)
        return row.gated and better is not None and better < AT_LEAST.get(row.cell.steps, 1.0)

    def keeps_too_little(self, row: Row) -> bool:
        """Whether a student keeps less of its picture than is asked of it."""
        teacher = self.teacher(row.cell.teacher)
        return row.gated and teacher is not None and teacher.median("kept") - row.median("kept") > KEPT_WITHIN

    def best(self, steps: int) -> list[Row]:
        """Of each teacher the student with the lowest FD at this step count, if there is any."""
        best: dict[str, Row] = {}
        for row in sorted(self.students(gated=True), key=lambda row: row.fd, reverse=True):
            if row.cell.steps == steps:
                best[row.cell.teacher] = row
        return list(best.values())

    def markdown(self) -> str:
        """The table, that of teachers that are shown a picture, and what is to be said below them."""
        groups = [[row for row in self.rows if row.shown is shown] for shown in (False, True)]
        return "\n\n".join([*(self._table(rows) for rows in groups if rows), *self.sentences()])

    def _table(self, rows: Sequence[Row]) -> str:
        titles = [title.format(most=self.most) for title in _TITLES]
        if rows[0].shown:
            titles.insert(titles.index("agreement") + 1, "kept")
        lines = [titles, ["---", "---", *["---:"] * (len(titles) - 2)], *map(self._cells, rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def sentences(self) -> list[str]:
        """The number of samples, what is asked of the students, and what they reach."""
        num = self.rows[0].results[0].num
        asked = ", ".join(f"{least:g} at {in_steps(steps)}" for steps, least in AT_LEAST.items())
        how = (
            f"{num:,} samples in every row. FD of several seeds: median (lowest to highest). A student's FD is to be "
            f"lower than its teacher's at as many steps, by a factor of {asked}; {SHORT} marks what falls short."
        )
        if any(not row.gated for row in self.students()):
            how += " Of rows in brackets nothing is asked: they are trained from scratch."
        how += (
            " Passes: what the training costs in forward passes of one sample, of which a backward pass is two. CPU s: "
            "of training and evaluation, all threads together, for the first seed."
        )
        trainings = [(row.cell.training, row.cell.steps) for row in self.rows]
        if any(training is not None and training.at != (steps,) for training, steps in trainings):
            how += " Rows of one student at several step counts have its whole training in both."
        if any(row.shown for row in self.rows):
            how += (
                f" Kept: 1 - mean absolute difference of the pixels that were given; a student's is to be at most "
                f"{KEPT_WITHIN} below its teacher's at {self.most}."
            )
        sentences = [how]
        for row in (row for steps in BEST_AT for row in self.best(steps)):
            teacher, over = self.teacher(row.cell.teacher), self.over(row)
            if teacher is None or over is None:
                continue
            most = AT_MOST_SHOWN.get(row.cell.steps) if row.shown else AT_MOST
            verdict = (
                "" if most is None else f": {'within' if over <= most else 'not within'} the {most} that are asked"
            )
            sentences.append(
                f"The best student at {in_steps(row.cell.steps)}, `{row.name}` on `{row.cell.teacher}`, has {over:.2f} "
                f"times the FD of its teacher at {teacher.cell.steps}{verdict}."
            )
        return sentences

    def picture(self, results: Path) -> Image.Image:
        """One row of samples for each cell, one of each class: same noise, same prompts, and the same pictures."""
        drawn: list[GridRow] = []
        for row in self.rows:
            if (strip := read_strip(results, row.cell)) is None:
                continue
            label = f"{row.cell.teacher}: what is given"
            if row.shown and all(other.label != label for other in drawn):
                drawn.append(GridRow(label, _given(len(strip))))
            drawn.append(GridRow(_label(row), strip))
        if not drawn:
            raise UserError(f"{results} holds no samples: run make methods")
        return draw_grid(drawn, smallest=PICTURE_CELL).convert("L")

    def _cells(self, row: Row) -> list[str]:
        result, training = row.results[0], row.cell.training
        values = sorted(one.metrics["fd_test"] for one in row.results)
        fd = f"{row.fd:.3f}" + (f" ({values[0]:.3f} to {values[-1]:.3f})" if len(values) > 1 else "")
        about = [f"`{row.cell.teacher}`", str(row.cell.steps), f"{result.nfe:g}", fd]
        judged = [f"{row.median('agreement'):.3f}", f"{row.median('recall'):.3f}"]
        if row.shown:
            judged.insert(1, f"{row.median('kept'):.3f}" + (f" {SHORT}" if self.keeps_too_little(row) else ""))
        over = _number(self.over(row), "{:.2f}")
        if training is None:
            return [TEACHER, *about, "", over, *judged, "", "", "", ""]
        name = f"`{training.name}`" if training.gated else f"(`{training.name}`)"
        better = _number(self.better(row), "{:.1f}x") + (f" {SHORT}" if self.falls_short(row) else "")
        steps = str(result.content["settings"]["max_steps"])
        seconds = f"{sum(result.seconds.values())} {result.versions.get('cpu', '')}".strip()
        cost = [steps, f"{row.passes / 1000:,.0f} k", seconds]
        return [name, *about, better, over, *judged, str(len(row.results)), *cost]


def _number(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def _label(row: Row) -> str:
    return f"{row.cell.teacher}: {row.name}, {in_steps(row.cell.steps)}"


def _given(count: int) -> Tensor:
    """The pictures of the first samples with their holes in grey, uint8 (count, 1, H, W)."""
    pairs = [pair for item in inpainting_items(count) if (pair := picture_and_hole(item)) is not None]
    return torch.stack([picture.masked_fill(hole, _HOLE) for picture, hole in pairs])


def compare(cells: Sequence[Cell], results: Path) -> Comparison:
    """Rows of the cells whose results are there and hold; seeds of one cell together, each teacher's cells together.

    Args:
        cells: in the table's order, of every seed.
        results: folder.

    Raises:
        UserError: nothing is there, or what is there cannot be compared.
    """
    groups: dict[str, list[tuple[Cell, Result]]] = {}
    for cell in sorted(cells, key=lambda cell: list(dict.fromkeys(c.teacher for c in cells)).index(cell.teacher)):
        result = read_result(results, cell)
        if result is not None and why_stale(cell, result) is None:
            groups.setdefault(cell.name, []).append((cell, result))
    if not groups:
        raise UserError(f"{results} holds no result of a present recipe: run make methods")
    return Comparison([Row(group[0][0], [result for _, result in group]) for group in groups.values()])


def insert(document: str, table: str) -> str:
    """A document with the table in its place.

    Raises:
        UserError: it has no such place.
    """
    before, begin, rest = document.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise UserError(f"the document has no place for the table: {_BEGIN} and {_END}")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"
