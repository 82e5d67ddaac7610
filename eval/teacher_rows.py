"""Measures the rows of the embedded teachers that ship with the package, as any other row is measured.

python -m fewstep.eval.teacher_rows         a quarter of an hour on two cores
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from fewstep.data.durable import write_text_durably
from fewstep.eval.config import EvalConfig
from fewstep.eval.evaluate import prepared
from fewstep.eval.known_rows import METRICS, NAME, NUM, STEPS, content_of
from fewstep.fashion import TEXT_TEACHERS


def measured(num: int = NUM, steps: tuple[int, ...] = STEPS) -> list[dict[str, Any]]:
    """The rows of the embedded teachers of text, as `fewstep.eval.known_rows.KnownRow` has them."""
    found = []
    for name in TEXT_TEACHERS:
        with tempfile.TemporaryDirectory() as out:
            options: dict[str, Any] = {"num": num, "teacher_steps": steps, "metrics": METRICS, "images": "shown"}
            evaluation = prepared([], EvalConfig(out=Path(out), teacher=name, **options))
            report = evaluation.run()
        for source, row in zip(evaluation.sources, report.rows, strict=True):
            told = {key: row[key] for key in ("nfe", "metrics", "spread")}
            found.append({"content": content_of(source), **told, "versions": report.versions})
    return found


if __name__ == "__main__":
    write_text_durably(Path(__file__).parent / NAME, json.dumps(measured(), indent=1) + "\n")
