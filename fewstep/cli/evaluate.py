"""``fewstep eval DIR ...``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.config.parsing import Parser, parse, step_counts
from fewstep.data.conditions import read_classes, read_prompts
from fewstep.eval.evaluate import evaluate
from fewstep.teachers.names import embedded_name


def run(words: Sequence[str]) -> None:
    """Measure students beside their teacher, and print the table."""
    parser = Parser(
        prog="fewstep eval", description="Measure students beside their teacher: report.json, report.md, grid.png."
    )
    parser.add_argument("students", metavar="DIR", nargs="+", type=str, help="student folders")
    parser.add_argument("--teacher", type=str | None, default=None, help="folder, hub id, fashion-sd or fashion-flow")
    parser.add_argument("--revision", type=str | None, default=None, help="of a teacher that is a hub id")
    parser.add_argument("--subfolder", type=str | None, default=None, help="where the teacher lies in it")
    parser.add_argument("--variant", type=str | None, default=None, help="of the teacher's weights, such as fp16")
    parser.add_argument("--base", type=str | None, default=None, help="of LoRAs: their base model's folder or hub id")
    parser.add_argument("--teacher_steps", type=str, default="1,4,25", help="comma separated")
    parser.add_argument(
        "--teacher_call", type=dict[str, Any] | None, default=None, help="JSON of arguments for its call"
    )
    parser.add_argument("--steps", type=str, default="1,2,4", help="the students' step counts, comma separated")
    parser.add_argument("--num", type=int, default=5000, help="samples in every row")
    parser.add_argument("--prompts", type=str | None, default=None, help="UTF-8 file, one a line")
    parser.add_argument("--classes", type=str | None, default=None, help="labels such as 0-9")
    parser.add_argument(
        "--batch_size", type=int | None, default=None, help="default: 100 for embedded teachers, else 8"
    )
    parser.add_argument("--dtype", type=str, default="float32", help="float32, float16 or bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=str, required=True, help="folder for the report")
    parsed = parse(parser, words)
    embedded = parsed.teacher is not None and embedded_name(parsed.teacher) is not None
    report = evaluate(
        parsed.students,
        teacher=parsed.teacher,
        revision=parsed.revision,
        subfolder=parsed.subfolder,
        variant=parsed.variant,
        base=parsed.base,
        teacher_steps=step_counts("--teacher_steps", parsed.teacher_steps),
        teacher_call=parsed.teacher_call,
        steps=step_counts("--steps", parsed.steps),
        num=parsed.num,
        prompts=read_prompts(parsed.prompts) if parsed.prompts else None,
        classes=read_classes(parsed.classes) if parsed.classes else None,
        batch_size=parsed.batch_size or (100 if embedded else 8),
        dtype=parsed.dtype,
        seed=parsed.seed,
        out=Path(parsed.out),
    )
    print(report.table())
