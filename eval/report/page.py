"""The page: a report as one file for a browser, with nothing to fetch, and nothing in it that runs but its own script.

Every text of a report is somebody else's (names of models, prompts, notes). The template escapes all of it, and the
page's own policy admits one style sheet and one script, by their hashes, and no address beyond the page.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from fewstep.eval.models import in_steps
from fewstep.eval.report import chart, words
from fewstep.eval.report.content import Content
from fewstep.eval.report.embedded import BUDGET, embed
from fewstep.eval.report.table import columns, plain

#: Letters of one text of somebody else's; the rest of it is in report.json.
LONGEST = 300
COLOURS = 8  # in page.css


def page(report: Content, folder: Path, *, budget: int = BUDGET) -> str:
    """The content of ``report.html``.

    Args:
        report: to show.
        folder: that the rows' pictures are relative to.
        budget: bytes that its pictures may take, as text.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["short"] = short
    style, script = _own("page.css"), _own("page.js")
    pictures = embed(folder, [row["pictures"] for row in report.rows], budget)
    measured = [name for name in [report.principal(), *report.of_quality()] if name is not None]
    return environment.from_string(_own("page.html")).render(
        title=report.title,
        policy=_policy(style, script),
        style=style,
        script=script,
        headlines=words.headlines(report),
        columns=columns(report),
        rows=report.rows,
        names=[f"{plain(row['model'])}, {in_steps(row['steps'])}" for row in report.rows],
        charts=[(report.measures[name].title, list(chart.charts(report, name))) for name in dict.fromkeys(measured)],
        colours=COLOURS,
        size=(chart.WIDTH, chart.HEIGHT),
        plot=(chart.LEFT, chart.RIGHT, chart.BOTTOM),
        pictures=pictures,
        budget=budget,
        shown=[_condition(report, column) for column in range(pictures.columns)],
        baseline=_place_of_baseline(report),
        measured=words.provenance(report) + words.timing(report),
        notes=[*words.kept_in_view(report), *map(plain, report.notes), *pictures.notes],
        skipped=list(map(plain, report.skipped)),
        versions=", ".join(f"{name} {version}" for name, version in report.versions.items()),
    )


def short(text: str, longest: int = LONGEST) -> str:
    """A text, or its beginning."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _condition(report: Content, column: int) -> str:
    """What a column's samples were asked for."""
    shown = report.conditions["shown"]
    if column >= len(shown):
        return f"sample {column}"
    return plain(shown[column]) if report.conditions["kind"] == "prompt" else f"class {plain(shown[column])}"


def _place_of_baseline(report: Content) -> int:
    """The row that others are compared with first."""
    baseline = report.baseline()
    return next((place for place, row in enumerate(report.rows) if row is baseline), 0)


def _own(name: str) -> str:
    return files("fewstep.eval.report").joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Pictures that are in the page; this style and this script; nothing else, and no address."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    rules: dict[str, Any] = {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": f"'sha256-{hashes[0]}'",
        "script-src": f"'sha256-{hashes[1]}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())
