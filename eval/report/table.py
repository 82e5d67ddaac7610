"""A report's rows as columns of text, for the terminal, for markdown and for the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fewstep.errors import printable
from fewstep.eval.report.content import Content

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: its heading.
        cells: one text per row, "" where there is no number.
        values: what a row is sorted by, None where there is no number.
        about: what the numbers are, in a sentence; "" where the title says it.
        better: "lower", "higher" or "near", or None.
    """

    title: str
    cells: list[str]
    values: list[float | None]
    about: str = ""
    better: str | None = None

    @property
    def numeric(self) -> bool:
        """Whether it holds numbers, which stand to the right."""
        return any(value is not None for value in self.values)


def columns(report: Content) -> list[Column]:
    """The columns that hold something, in the order of the measures; a floor stands right of its number."""
    made = [*_names(report), *_numbers(report), *_speed(report)]
    return [column for column in made if any(column.cells)]


def text_table(report: Content) -> str:
    """In plain text: names to the left, numbers to the right."""
    titles, lines, numeric = _cells(report)
    widths = [max(len(line[c]) for line in [titles, *lines]) for c in range(len(titles))]
    shown = [
        "  ".join(cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(line, widths, numeric))
        for line in [titles, *lines]
    ]
    shown.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in shown)


def markdown_table(report: Content) -> str:
    """In markdown."""
    titles, lines, numeric = _cells(report)
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join(map(_markdown_row, [titles, rule, *lines]))


def _cells(report: Content) -> tuple[list[str], list[list[str]], list[bool]]:
    """Titles, lines of cells, and whether each column holds numbers."""
    made = columns(report)
    lines = [[column.cells[r] or "-" for column in made] for r in range(len(report.rows))]
    return [column.title for column in made], lines, [column.numeric for column in made]


def _names(report: Content) -> Iterator[Column]:
    rows = report.rows
    yield Column("model", [plain(row["model"]) for row in rows], [None] * len(rows))
    yield _column(report, "steps", lambda row: row["steps"], "{:d}")
    about = "denoiser evaluations for one sample, counted; a guided pair is two"
    yield _column(report, "NFE", lambda row: row["nfe"], "{:g}", about=about)
    if len({row["num"] for row in rows}) > 1:
        yield _column(report, "samples", lambda row: row["num"], "{:,d}")


def _numbers(report: Content) -> Iterator[Column]:
    teacher, principal = report.baseline(), {report.principal(row) for row in report.rows}
    for name, measure in report.measures.items():
        values = [row["metrics"].get(name) for row in report.rows]
        spreads = [row["spread"].get(name) for row in report.rows]
        cells = ["" if value is None else measure.printed(value, s) for value, s in zip(values, spreads)]
        yield Column(measure.heading, cells, values, about=measure.made_with, better=measure.better)
        if measure.has_floor:
            floors = [None if value is None else measure.floor for value in values]
            shown = ["" if floor is None else measure.printed(floor) for floor in floors]
            yield Column("floor", shown, floors, about=f"of {measure.title}: {measure.floor_of}")
        if name in principal and measure.has_floor:
            own = "teacher" if report.joined or teacher is None else f"teacher {teacher['steps']}"
            for title, key, pattern in (("x floor", "to_floor", "{:.1f}"), (f"x {own}", "to_teacher", "{:.2f}")):
                read = partial(_relative, f"{name}_{key}")
                yield _column(report, title, read, pattern, about=f"{measure.title} over that", better="lower")


def _speed(report: Content) -> Iterator[Column]:
    """Milliseconds of two reports were not measured side by side: each has columns of its own."""
    labels = list(dict.fromkeys(row.get("report") for row in report.rows if row["speed"]))
    for label in labels:
        of = f" ({label})" if len(labels) > 1 else ""
        for title, name, pattern, scale in (
            (f"latency ms{of}", "latency_ms", "{:.1f}", 1.0),
            (f"images/s{of}", "images_per_second", "{:.1f}", 1.0),
            (f"memory GiB{of}", "peak_memory_bytes", "{:.2f}", 2.0**-30),
        ):
            read = partial(_clock, label, name, scale)
            yield _column(report, title, read, pattern, better="higher" if name == "images_per_second" else "lower")
    values = [_clock(row.get("report"), "latency_ratio", 1.0, row) for row in report.rows]
    cells = ["" if value is None else times_as_fast(row["speed"]) for row, value in zip(report.rows, values)]
    about = "the teacher's latency over this one, measured side by side"
    yield Column("x as fast", cells, values, about=about, better="higher")


def times_as_fast(speed: Mapping[str, Any]) -> str:
    """The ratio of the latencies, with the range that it was measured in."""
    low, high = speed.get("latency_ratio_low"), speed.get("latency_ratio_high")
    spread = "" if low is None or high is None else f" ({low:.1f} to {high:.1f})"
    return f"{speed['latency_ratio']:.1f}{spread}"


def _column(
    report: Content,
    title: str,
    read: Callable[[Row], Any],
    pattern: str,
    *,
    about: str = "",
    better: str | None = None,
) -> Column:
    values = [read(row) for row in report.rows]
    return Column(title, ["" if v is None else pattern.format(v) for v in values], values, about, better)


def _relative(key: str, row: Row) -> float | None:
    return row["relative"].get(key)


def _clock(label: str | None, name: str, scale: float, row: Row) -> float | None:
    if not row["speed"] or row.get("report") != label or row["speed"].get(name) is None:
        return None
    return float(row["speed"][name]) * scale


def plain(text: str) -> str:
    """A text of somebody else's on one line, without what would steer a terminal."""
    return printable(" ".join(text.split()))


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(map(markdown_text, cells)) + " |"


def markdown_text(text: str) -> str:
    """A text of somebody else's in markdown: on one line, no bar of a table, no tag, no link."""
    escaped = plain(text).replace("&", "&amp;").replace("<", "&lt;")
    return "".join("\\" + c if c in "|[]`*\\" else c for c in escaped)
