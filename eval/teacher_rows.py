"""Measures the rows of the embedded teachers that ship with the package, as any other row is measured.

python -m fewstep.eval.teacher_rows         twenty minutes on two cores
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.data.durable import write_text_durably
from fewstep.eval.config import EvalConfig
from fewstep.eval.evaluate import prepared
from fewstep.eval.known_rows import NAME, NUM, STEPS, content_of, metrics_of
from fewstep.fashion import TEACHERS


def measured(
    names: Sequence[str] = tuple(TEACHERS), num: int = NUM, steps: tuple[int, ...] = STEPS
) -> list[dict[str, Any]]:
    """The rows of embedded teachers, as `fewstep.eval.known_rows.KnownRow` has them."""
    found = []
    for name in names:
        with tempfile.TemporaryDirectory() as out:
            options: dict[str, Any] = {"num": num, "teacher_steps": steps, "images": "shown"}
            options["metrics"] = metrics_of(name)
            evaluation = prepared([], EvalConfig(out=Path(out), teacher=name, **options))
            report = evaluation.run()
        for source, row in zip(evaluation.sources, report.rows, strict=True):
            told = {key: row[key] for key in ("nfe", "metrics", "spread")}
            found.append({"content": content_of(source), **told, "versions": report.versions})
    return found


if __name__ == "__main__":
    write_text_durably(Path(__file__).parent / NAME, json.dumps(measured(), indent=1) + "\n")
