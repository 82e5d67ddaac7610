"""The part of a student's card about pictures: under which other pipelines it is right, and at which strengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewstep.export.related.call import STRENGTH
from fewstep.export.related.ranges import Range
from fewstep.export.related.record import rows_at


def related_section(about: Mapping[str, Any], place: str) -> str | None:
    """The section's text, None where the family has no pipeline that is right with pictures.

    Args:
        about: the content of ``fewstep.json``.
        place: what stands for the student's folder on the card, quoted.
    """
    related = about["related"]
    right = {name: record for name, record in related.items() if "why_not" not in record}
    if not right:
        return None
    first, record = next(iter(right.items()))
    pictures = " and ".join(f"`{argument}`" for argument in record["images"])
    parts = [
        "## With pictures",
        "Other pipelines of the family run on the same weights. "
        f'`fewstep.load({place}, pipeline="{record["task"]}")` is a `{first}`: its call takes {pictures} beside the '
        "prompt, fills in the rest, and refuses a strength at which the student would be wrong.",
        "What a strength means is each pipeline's own rounding. Every row was run (a time of 1 is noise):",
        _table(about, right),
    ]
    parts += [f"`{name}`: {record['remark']}." for name, record in right.items() if "remark" in record]
    for package in sorted({record["needs"] for record in right.values() if "needs" in record}):
        needing = ", ".join(f"`{name}`" for name, record in right.items() if record.get("needs") == package)
        parts.append(f"{needing}: `pip install {package}` first.")
    if len(right) < len(related):
        parts.append("Other pipelines of the family are not for this student; `fewstep.json` says why, of each.")
    return "\n\n".join(parts)


def _table(about: Mapping[str, Any], right: Mapping[str, Mapping[str, Any]]) -> str:
    """One row for each range; pipelines that do the same share their rows."""
    alike: dict[str, list[str]] = {}
    for name, record in right.items():
        rows = []
        for count in about["counts"]:
            for row in rows_at(record, count):
                strength = _strength(row) if STRENGTH in record["call"] else "takes none"
                rows.append(f"| {count} | {strength} | {_outcome(row)} |")
        alike.setdefault("\n".join(rows), []).append(f"`{name}` ({record['task']})")
    head = "| steps | strength | calls | first time |\n| ---: | --- | ---: | ---: |"
    return "\n\n".join(f"{', '.join(names)}:\n\n{head}\n{rows}" for rows, names in alike.items())


def _strength(row: Range) -> str:
    if row.low == row.high:
        return f"{row.low:.4g}"
    low, high = row.shown_ends()
    return f"{'from' if row.holds_low else 'above'} {low:g} {'to' if row.holds_high else 'to below'} {high:g}"


def _outcome(row: Range) -> str:
    outcome = row.outcome
    if outcome.why_not is not None:
        return f"refused: {outcome.why_not} |"
    return f"{outcome.calls} | {outcome.time:.4g}"
