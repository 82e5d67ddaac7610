"""``fewstep demo``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.config.parsing import Parser, parse, with_values
from fewstep.errors import UserError
from fewstep.eval.demo import demo


def run(words: Sequence[str]) -> None:
    """Distil an embedded teacher, and print the table of both."""
    parser = Parser(prog="fewstep demo", description="Distil an embedded teacher with DMD2 and compare both.")
    parser.add_argument("--teacher", type=str, default="fashion-sd", help="fashion-sd or fashion-flow")
    parser.add_argument("--steps", type=int, default=4, help="the student's step count")
    parser.add_argument("--out", type=str | None, default=None, help="default: runs/demo-TEACHER[-STEPS][-seedN]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int | None, default=None, help="default: the shipped recipe's")
    parser.add_argument("--num", type=int | None, default=None, help="samples in every row of the report")
    parser.add_argument(
        "--measure_teacher", type=bool, default=False, help="sample the teacher here; its rows ship with the package"
    )
    parsed = parse(parser, with_values(words, {"measure_teacher"}))
    if parsed.num is not None and parsed.num < 1:  # said now, and not after the training
        raise UserError(f"--num must be at least 1, not {parsed.num}")
    steps = f"-{parsed.steps}step{'s' * (parsed.steps > 1)}" if parsed.steps != 4 else ""
    seed = f"-seed{parsed.seed}" if parsed.seed else ""
    out = Path(parsed.out or f"runs/demo-{parsed.teacher}{steps}{seed}")
    report = demo(
        parsed.teacher,
        out,
        steps=parsed.steps,
        seed=parsed.seed,
        max_steps=parsed.max_steps,
        num=parsed.num,
        measure_teacher=parsed.measure_teacher,
    )
    print(report.table())
    print(
        f"pictures: {out / 'report' / 'grid.png'}, report: {out / 'report' / 'report.md'}, student: {out / 'student'}"
    )
