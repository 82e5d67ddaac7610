"""Rows of the embedded teachers that were measured once and ship with the package.

`python -m fewstep.eval.teacher_rows` measures them anew.

They are bound by a hash to all that their numbers depend on but the machine and its libraries: teacher, call,
conditions, seed, number of samples, classifier and reference. A row of another number of samples is never taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from fewstep.data.durable import as_json, json_sha256
from fewstep.errors import UserError
from fewstep.eval.sources import SAMPLING, ModelSource
from fewstep.fashion import looking
from fewstep.fashion.files import CLASSIFIER, REFERENCE, manifest
from fewstep.reading import read_json

NAME = "teacher_rows.json"
#: Of the shipped rows: those of the demo.
NUM = 2000
STEPS = (1, 2, 4, 25)
METRICS = ("fd_test", "agreement", "prdc", "diversity", "saturation")
#: And of a teacher that fills holes.
OF_HOLES = ("kept",)


@dataclass(frozen=True)
class KnownRow:
    """The numbers of a row that need not be measured; fields as of `fewstep.eval.rows.Row.to_dict`.

    content: the hash of what they depend on. versions: of what measured them.
    """

    content: str
    nfe: float
    metrics: Mapping[str, float]
    spread: Mapping[str, float]
    versions: Mapping[str, str]


def metrics_of(teacher: str) -> tuple[str, ...]:
    """The groups that an embedded teacher's shipped rows have."""
    return (*METRICS, *OF_HOLES) if looking(teacher) else METRICS


def content_of(source: ModelSource) -> str | None:
    """The hash of what a row of an embedded teacher depends on; None for any other model."""
    name = source.model.embedded
    if name is None or source.model.role != "teacher":
        return None
    known = manifest()["files"]
    theirs = {path: about["sha256"] for path, about in known.items() if path.startswith(f"{name}/")}
    about = {
        "sampling": SAMPLING,
        "teacher": theirs,
        "call": source.call,
        "conditions": source.conditions.about(),
        "samples": [source.num, source.seed],
        "judge": [known[CLASSIFIER]["sha256"], known[REFERENCE]["sha256"]],
    }
    return json_sha256(as_json(about))


def known_row(source: ModelSource) -> KnownRow | None:
    """The shipped row that says what this source would be measured as, or None."""
    return _shipped().get(content_of(source) or "")


@cache
def _shipped() -> dict[str, KnownRow]:
    place = files("fewstep.eval") / NAME
    try:
        rows = [KnownRow(**row) for row in read_json(Path(str(place)))]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{place} is damaged: install fewstep again") from error
    return {row.content: row for row in rows}
