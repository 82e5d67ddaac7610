"""A report's sentences: what came out, how it was measured, and what is not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fewstep.eval.models import in_steps
from fewstep.eval.report.content import Content
from fewstep.eval.report.table import plain, times_as_fast


def headlines(report: Content) -> list[str]:
    """One sentence per student row: its first number of quality beside floor and teacher, its speed-up, its cost."""
    return [
        f"{plain(row['model'])} at {in_steps(row['steps'])}: {', '.join(_facts(report, row))}."
        for row in report.rows
        if row["role"] == "student"
    ]


def _facts(report: Content, row: Mapping[str, Any]) -> Iterator[str]:
    teacher = report.baseline()
    independent = next((name for name in report.independent() if name in row["metrics"]), None)
    for name in dict.fromkeys([report.principal(row), independent]):
        if name is None:
            continue
        measure, beside = report.measures[name], []
        if measure.floor is not None:
            beside.append(f"floor {measure.printed(measure.floor)}")
        if teacher is not None and not report.joined and name in teacher["metrics"]:
            beside.append(f"teacher at {in_steps(teacher['steps'])} {measure.printed(teacher['metrics'][name])}")
        number = f"{measure.heading} {measure.printed(row['metrics'][name], row['spread'].get(name))}"
        yield number + (f" ({', '.join(beside)})" if beside else "")
    if row["speed"] and "latency_ratio" in row["speed"]:
        whose = f"{in_steps(teacher['steps'])}" if teacher is not None and not report.joined else "call"
        yield f"{times_as_fast(row['speed'])} times as fast as the teacher's {whose}"
    yield f"{row['nfe']:g} network evaluation{'s' if row['nfe'] != 1 else ''}"


def provenance(report: Content) -> list[str]:
    """How the numbers were measured: samples, networks and their files, references, floors."""
    sentences = []
    if report.num is not None and report.seed is not None:
        sentences.append(
            f"Every row: {report.num:,} samples, base seed {report.seed}; sample i has one seed in all rows."
        )
    made: dict[str, list[str]] = {}
    for measure in report.measures.values():
        made.setdefault(measure.made_with, []).append(measure.heading)
    sentences += [f"{', '.join(titles)}: {how}." for how, titles in made.items()]
    for measure in report.measures.values():
        if measure.floor is not None:
            sentences.append(f"Floor of {measure.title}: {measure.printed(measure.floor)}, {measure.floor_of}.")
        elif measure.has_floor:
            sentences.append(f"{measure.title} has no floor: {measure.floor_of}.")
    unverified = [measure.title for measure in report.measures.values() if not measure.verified]
    if unverified:
        sentences.append(f"† unverified: there is no published hash of the weights behind {', '.join(unverified)}.")
    return sentences


def kept_in_view(report: Content) -> list[str]:
    """That a number stands here which training did not optimise, and one of diversity; a sentence where none does."""
    sentences = []
    optimised = [report.measures[name].title for name in report.of_quality() if name in report.optimised]
    if not report.independent():
        sentences.append("There is no number of quality here that training did not optimise.")
    elif optimised:
        rest = ", ".join(report.measures[name].title for name in report.independent())
        sentences.append(f"Training optimised {', '.join(optimised)}, or chose by it; it did not know {rest}.")
    if not report.has_diversity():
        sentences.append("There is no number of diversity here: how much the samples vary is not known.")
    return sentences


def timing(report: Content) -> list[str]:
    """Under which conditions the clock ran, once for each report that was joined."""
    found: dict[str, None] = {}
    for row in report.rows:
        told = row["speed"] or {}
        names = ("device", "dtype", "threads", "torch", "batch_size")
        if told.get("latency_ms") is None or any(name not in told for name in names):
            continue
        where = f"{told['device']}, {told['dtype']}, {told['threads']} threads, torch {told['torch']}"
        of = f" ({row['report']})" if "report" in row else ""
        found[f"Latency{of}: median of one sample a call; images/s at batch {told['batch_size']}; {where}."] = None
    return list(found)


def sentences(report: Content) -> list[str]:
    """All of them, in the order in which they are read."""
    said = headlines(report) + provenance(report) + timing(report) + kept_in_view(report)
    return said + [plain(sentence) for sentence in [*report.notes, *report.skipped]]
