"""``fewstep verdict OUT``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.config.parsing import Parser, parse
from fewstep.errors import UserError
from fewstep.training.verdict import judged, read_log


def run(words: Sequence[str]) -> None:
    """Print what the log of a run says, going on or ended."""
    parser = Parser(
        prog="fewstep verdict",
        description="Say whether a training works, from its metrics.jsonl alone; exit 0 if nothing is wrong.",
    )
    parser.add_argument("out", type=str, help="folder of a run")
    rows = read_log(Path(parse(parser, words).out) / "metrics.jsonl")
    wrong = 0
    for trouble, over in judged(rows):
        wrong += over is None
        print(trouble.words + ("" if over is None else f"; this was over by step {over}"))
    steps = rows[-1]["step"] if rows else 0
    if wrong:
        raise UserError(f"{wrong} thing{'s are' if wrong > 1 else ' is'} wrong after {steps} steps, see above")
    print(f"nothing is wrong after {steps} step{'s' * (steps != 1)}")
