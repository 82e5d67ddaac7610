"""Whether what a file holds is a report's content: every name, every type, and what has to agree with each other."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fewstep.eval.report.measure import Measure
from fewstep.eval.report.protocol import digest_of
from fewstep.reading import Kinds, inside, misfit

NONE = type(None)
TOP: Kinds = {
    "schema": int,
    "protocol": dict,
    "num": (int, NONE),
    "seed": (int, NONE),
    "measures": dict,
    "conditions": dict,
    "rows": list,
    "reference": (dict, NONE),
    "skipped": list,
    "notes": list,
    "settings": dict,
    "versions": dict,
    "optimised": list,
    "joined": list,
}
MEASURE: Kinds = {
    "title": str,
    "group": str,
    "format": str,
    "better": (str, NONE),
    "extractor": (str, NONE),
    "scorer": (str, NONE),
    "weights_sha256": (str, NONE),
    "verified": bool,
    "resize": (str, NONE),
    "reference": (str, NONE),
    "n_ref": (int, NONE),
    "floor": (int, float, NONE),
    "floor_of": (str, NONE),
}
CONDITIONS: Kinds = {"kind": (str, NONE), "shown": list}
ROW: Kinds = {
    "model": str,
    "role": str,
    "steps": int,
    "nfe": (int, float),
    "num": int,
    "metrics": dict,
    "spread": dict,
    "relative": dict,
    "call": dict,
    "speed": (dict, NONE),
    "pictures": list,
    "report": str,
}
#: What of a row's speed has to be a number where it is there.
CLOCK = (
    "latency_ms",
    "latency_p90_ms",
    "latency_ratio",
    "latency_ratio_low",
    "latency_ratio_high",
    "images_per_second",
    "throughput_ratio",
    "peak_memory_bytes",
)


def problem(content: Any) -> str | None:
    """What of a report's content is not as it should be, in words; None where all is.

    Args:
        content: of ``report.json``, of the right schema.
    """
    return next(_problems(content), None)


def _problems(content: Any) -> Iterator[str]:
    """The first problem; nobody asks on, so what comes after one may rely on what comes before."""
    yield from _table("it", content, TOP)
    if not isinstance(content["protocol"].get("digest"), str):
        yield "its protocol has no digest"
    if content["protocol"]["digest"] != digest_of(content["protocol"]):
        yield "its protocol does not fit its digest"
    for name in ("num", "seed"):
        if content[name] is None and not content["joined"]:
            yield f"its {name} is null, and it joins no reports"
    for name, measure in content["measures"].items():
        yield from _measure(f"its measure {name!r}", measure)
    yield from _table("its conditions", content["conditions"], CONDITIONS)
    if content["conditions"]["kind"] not in ("prompt", "label", "item", None):
        yield "its conditions are of no known kind"
    texts = [content["conditions"]["shown"], *(content[name] for name in ("skipped", "notes", "optimised"))]
    if any(not isinstance(text, str) for listed in texts for text in listed):
        yield "one of its conditions, notes, skipped or optimised metrics is no text"
    if any(not isinstance(version, str) for version in content["versions"].values()):
        yield "one of its versions is no text"
    if any(not isinstance(report, dict) for report in content["joined"]):
        yield "one of the reports that it joins is no table"
    if not content["rows"]:
        yield "it has no rows"
    for number, row in enumerate(content["rows"], 1):
        yield from _row(f"its row {number}", row, content["measures"])


def _table(what: str, table: Any, kinds: Kinds, optional: Iterable[str] = ()) -> Iterator[str]:
    """What of a table is not as `kinds` says, or is in it beside."""
    found = misfit(table, kinds, optional)
    if found is None and (unknown := sorted(map(str, table.keys() - kinds.keys()))):
        found = f"it has an unknown {unknown[0]!r}"
    if found is not None:
        yield found if what == "it" else f"{what}: {found}"


def _measure(what: str, content: Any) -> Iterator[str]:
    yield from _table(what, content, MEASURE)
    if not _finite(content["floor"], optional=True):
        yield f"{what} has a floor that is no finite number"
    if (wrong := Measure(**content).problem()) is not None:
        yield f"{what} {wrong}"


def _row(what: str, row: Any, measures: Mapping[str, Any]) -> Iterator[str]:
    yield from _table(what, row, ROW, optional=("report",))
    if row["role"] not in ("teacher", "student"):
        yield f"{what} has the role {row['role']!r}: that is teacher or student"
    if row["steps"] < 1 or row["num"] < 1 or not _finite(row["nfe"]):
        yield f"{what} has steps, num or nfe that cannot be"
    numbers = [*row["metrics"].values(), *row["spread"].values(), *row["relative"].values()]
    numbers += [row["speed"][name] for name in CLOCK if name in (row["speed"] or {})]
    if not all(map(_finite, numbers)):
        yield f"{what} has a number that is none, or is not finite"
    if unknown := sorted(row["metrics"].keys() - measures.keys()):
        yield f"{what} has a number {unknown[0]!r} that its measures do not name"
    if unknown := sorted(row["spread"].keys() - row["metrics"].keys()):
        yield f"{what} has a spread of {unknown[0]!r} and no such number"
    for picture in row["pictures"]:
        try:
            path = inside(Path(), picture)
        except ValueError as error:
            yield f"{what} has a picture elsewhere: {error}"
        else:
            if path.suffix != ".png":
                yield f"{what} has a picture that is no .png"


def _finite(value: Any, *, optional: bool = False) -> bool:
    if value is None:
        return optional
    # A whole number of a thousand digits is no float, and math.isfinite would raise.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
