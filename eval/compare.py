"""Reports of several evaluations as one: their rows side by side, in files of their own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fewstep.data.durable import write_durably
from fewstep.errors import UserError
from fewstep.eval.report import Report
from fewstep.eval.report.embedded import readable
from fewstep.eval.report.joining import Source, join, pictures_side_by_side
from fewstep.eval.report.pictures import FOLDER

FILE = "report.json"


def compare(folders: Sequence[str | Path], out: str | Path) -> Report:
    """Join reports; write ``report.json``, ``report.md``, ``report.html`` and the pictures into `out`.

    Args:
        folders: those that `fewstep.eval.evaluate` wrote into, two or more.
        out: another folder.

    Raises:
        UserError: a report cannot be read, stands there twice or joins others already, or `out` is one of the folders.
    """
    places = [Path(folder).parent if Path(folder).name == FILE else Path(folder) for folder in folders]
    if len(places) < 2:
        raise UserError("to compare takes two reports or more: give the folders that fewstep eval wrote")
    resolved = [place.resolve() for place in places]
    if (twice := next((p for p, r in zip(places, resolved) if resolved.count(r) > 1), None)) is not None:
        raise UserError(f"{twice} is given twice")
    out = Path(out)
    if out.resolve() in resolved:
        raise UserError(f"--out {out} is one of the reports, which would be overwritten: give another folder")
    reports = [Report.load(place / FILE) for place in places]
    if (joined := next((p for p, report in zip(places, reports) if report.joined), None)) is not None:
        raise UserError(f"{joined / FILE} joins reports already: give those that it was made of")
    labels = distinct(resolved)
    made = join([Source(label, str(p), report) for label, p, report in zip(labels, places, reports)])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}") from error
    side_by_side = pictures_side_by_side(reports)
    for row in made.rows:
        number = labels.index(row["report"])
        shown = row["pictures"] if side_by_side else []
        row["pictures"] = [_copy(places[number], name, out, f"{FOLDER}/{number}") for name in shown]
    made.save(out)
    return made


def distinct(folders: Sequence[Path]) -> list[str]:
    """As short a name for each folder as tells it from the others; ``a`` of ``runs/a/report``."""
    parts = [f.parts[:-1] if f.name == "report" and len(f.parts) > 2 else f.parts for f in folders]
    if len(set(parts)) < len(parts):
        parts = [folder.parts for folder in folders]
    longest = max(map(len, parts))
    named = (["/".join(part[-depth:]) for part in parts] for depth in range(1, longest + 1))
    return next(names for names in named if len(set(names)) == len(names))


def _copy(folder: Path, name: str, out: Path, below: str) -> str:
    """A picture beside the joined report, where it can be read; its name there in any case."""
    copied = f"{below}/{name.removeprefix(f'{FOLDER}/')}"
    if (path := readable(folder, name)) is not None:
        (out / copied).parent.mkdir(parents=True, exist_ok=True)
        write_durably(out / copied, partial(shutil.copyfile, path))
    return copied
