"""Several reports as one, in which a column holds numbers that were measured alike, and no others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fewstep.eval.report.measure import Measure
from fewstep.eval.report.protocol import digest_of
from fewstep.eval.report.report import Report

#: What of a measure is no matter of how it was measured.
_SHOWN_ONLY = ("title", "format", "floor_of")


@dataclasses.dataclass(frozen=True)
class Source:
    """A report that is joined: its label, the folder that its pictures are relative to as it was given, and itself."""

    label: str
    folder: str
    report: Report


def join(sources: Sequence[Source]) -> Report:
    """One report of all rows.

    A measure stands in one column for those reports that have the same protocol, extractor or scorer, weights, resize,
    reference, number of references, and floor; in one of its own for each other way, and a note says what differs. Rows
    keep their ratios to the teacher of their own report. Teacher's rows that are the same in all numbers stand once.

    Args:
        sources: with distinct labels.
    """
    columns = _columns(sources)
    reports = [source.report for source in sources]
    rows, merged = _rows(sources, columns)
    notes = [note for name in _names(reports) if (note := _difference(name, sources)) is not None]
    notes += [f"The teacher of {label} has the numbers of another report's, and stands there." for label in merged]
    alike = len({report.protocol["digest"] for report in reports}) == 1
    together = {"joined": [report.protocol["digest"] for report in reports]}
    shown = pictures_side_by_side(reports)
    if not shown and any(row["pictures"] for report in reports for row in report.rows):
        notes.append("The pictures are not shown side by side: seeds or conditions differ.")
    return Report(
        protocol=dict(reports[0].protocol) if alike else {**together, "digest": digest_of(together)},
        rows=rows,
        measures={column.key: column.measure for column in dict.fromkeys(columns.values())},
        num=_common(report.num for report in reports),
        seed=_common(report.seed for report in reports),
        conditions=max((r.conditions for r in reports), key=lambda c: len(c["shown"])) if shown else _nothing_shown(),
        reference=_common(report.reference for report in reports),
        skipped=_said((source.label, source.report.skipped) for source in sources),
        notes=notes + _said((source.label, source.report.notes) for source in sources),
        versions=_versions(reports),
        optimised=sorted(
            {columns[s.label, name].key for s in sources for name in s.report.optimised if (s.label, name) in columns}
        ),
        joined=[{"label": s.label, "folder": s.folder, "protocol": s.report.protocol} for s in sources],
    )


@dataclasses.dataclass(frozen=True)
class Column:
    """A measure in the joined report, and the name that it has there."""

    key: str
    measure: Measure


def how(report: Report, name: str) -> dict[str, Any]:
    """All that the numbers of a measure depend on, by names that a sentence can use."""
    measure = report.measures[name]
    told = {key: value for key, value in dataclasses.asdict(measure).items() if key not in _SHOWN_ONLY}
    protocol = {key: value for key, value in report.protocol.items() if key != "digest"}
    reference = report.reference if measure.reference is not None else None
    return {**protocol, **told, **({"reference of the report": reference} if reference else {})}


def pictures_side_by_side(reports: Sequence[Report]) -> bool:
    """Whether column i of all rows has the same seed and condition."""
    kept = {tuple(report.protocol.get(name) for name in ("seed", "conditions_sha256")) for report in reports}
    shown = [report.conditions["shown"] for report in reports]
    longest = max(shown, key=len)
    return len(kept) == 1 and all(one == longest[: len(one)] for one in shown)


def _names(reports: Iterable[Report]) -> list[str]:
    """Of all measures, in the order in which they come."""
    return list(dict.fromkeys(name for report in reports for name in report.measures))


def _groups(name: str, sources: Sequence[Source]) -> list[list[Source]]:
    """The reports that have a measure, those together that measured it alike."""
    groups: list[list[Source]] = []
    for source in sources:
        if name not in source.report.measures:
            continue
        alike = next((g for g in groups if how(g[0].report, name) == how(source.report, name)), None)
        if alike is None:
            groups.append([source])
        else:
            alike.append(source)
    return groups


def _columns(sources: Sequence[Source]) -> dict[tuple[str, str], Column]:
    """(label, name of a measure) -> its column. Those of one name stand beside each other."""
    columns: dict[tuple[str, str], Column] = {}
    for name in _names(source.report for source in sources):
        groups = _groups(name, sources)
        for group in groups:
            measure = group[0].report.measures[name]
            labels = ", ".join(source.label for source in group)
            key = name if len(groups) == 1 else f"{name} ({labels})"
            if len(groups) > 1:
                measure = dataclasses.replace(measure, title=f"{measure.title} ({labels})")
            columns |= {(source.label, name): Column(key, measure) for source in group}
    return columns


def _difference(name: str, sources: Sequence[Source]) -> str | None:
    """What keeps the numbers of one name apart, in a sentence."""
    groups = _groups(name, sources)
    if len(groups) < 2:
        return None
    first, told = groups[0][0], []
    for group in groups[1:]:
        one, other = how(first.report, name), how(group[0].report, name)
        keys = [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]
        facts = ", ".join(f"{key} {_brief(one.get(key))} and {_brief(other.get(key))}" for key in keys)
        told.append(f"{first.label} and {group[0].label} differ in {facts}")
    title = first.report.measures[name].title
    return f"{title} was not measured alike and has several columns, which must not be compared: {'; '.join(told)}."


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _rows(
    sources: Sequence[Source], columns: Mapping[tuple[str, str], Column]
) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows with the columns' names, the teachers' first; labels of reports whose teacher stood there already."""
    found: list[dict[str, Any]] = []
    merged: dict[str, None] = {}
    for source in sources:
        names = {name: columns[source.label, name].key for name in source.report.measures}
        for row in source.report.rows:
            told = {
                **row,
                "report": source.label,
                "metrics": {names[name]: value for name, value in row["metrics"].items()},
                "spread": {names[name]: value for name, value in row["spread"].items()},
                "relative": {_renamed(key, names): value for key, value in row["relative"].items()},
            }
            if row["role"] == "teacher" and row["metrics"] and any(_same(told, other) for other in found):
                merged[source.label] = None
            else:
                found.append(told)
    where: dict[str, set[str]] = {}
    for row in found:
        where.setdefault(row["model"], set()).add(row["report"])
    twice = {model for model, labels in where.items() if len(labels) > 1}
    for row in found:
        row["model"] = f"{row['report']}: {row['model']}" if row["model"] in twice else row["model"]
    return sorted(found, key=lambda row: row["role"] != "teacher"), list(merged)


def _renamed(key: str, names: Mapping[str, str]) -> str:
    """``fid_to_floor`` with the name that ``fid`` has here."""
    name, to, rest = key.rpartition("_to_")
    return f"{names.get(name, name)}{to}{rest}"


def _same(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows are one measurement but for the clock."""
    return all(row[key] == other[key] for key in ("role", "steps", "nfe", "num", "metrics", "spread", "call"))


def _common(values: Iterable[Any]) -> Any:
    """What all of them are, or None."""
    first, *rest = values
    return first if all(value == first for value in rest) else None


def _nothing_shown() -> dict[str, Any]:
    return {"kind": None, "shown": []}


def _said(sentences: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """What several reports say, each sentence once, with the reports that say it."""
    by: dict[str, list[str]] = {}
    for label, told in sentences:
        for sentence in told:
            by.setdefault(sentence, []).append(label)
    return [f"{', '.join(labels)}: {sentence}" for sentence, labels in by.items()]


def _versions(reports: Sequence[Report]) -> dict[str, str]:
    """Of the libraries; several of one library are all named."""
    names = dict.fromkeys(name for report in reports for name in report.versions)
    found = {name: dict.fromkeys(r.versions[name] for r in reports if name in r.versions) for name in names}
    return {name: " and ".join(versions) for name, versions in found.items()}
