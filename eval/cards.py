"""The numbers of an evaluation on the students' cards."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from fewstep.eval.models import Model, in_steps
from fewstep.eval.report import Report
from fewstep.export.card.card import write_numbers

logger = logging.getLogger(__name__)

_SPEED = ("latency_ms", "images_per_second")


def put_on_cards(models: Sequence[Model], report: Report) -> None:
    """Each student's card in a folder gets its own rows and the teacher's."""
    teacher = [row for row in report.rows if row["role"] == "teacher"]
    for model in {id(model): model for model in models}.values():
        folder = Path(model.source) if model.role == "student" and model.source else None
        own = [row for row in report.rows if row["model"] == model.name]
        if folder is None or not own or not (folder / "README.md").is_file():
            continue
        rows = {
            f"{'teacher' if row['role'] == 'teacher' else 'student'}, {in_steps(row['steps'])}": {
                "NFE": row["nfe"],
                **row["metrics"],
                **{name: value for name, value in (row["speed"] or {}).items() if name in _SPEED},
            }
            for row in [*teacher, *own]
        }
        try:
            write_numbers(folder, rows, " ".join(report.provenance()))
        except OSError as error:
            logger.warning("the card of %s is left as it is: %s", folder, error.strerror)
