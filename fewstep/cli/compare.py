"""``fewstep compare DIR ...``."""

from __future__ import annotations

from collections.abc import Sequence

from fewstep.config.parsing import Parser, parse
from fewstep.eval.compare import compare


def run(words: Sequence[str]) -> None:
    """Join reports, and print the table of all."""
    parser = Parser(
        prog="fewstep compare",
        description="Join reports of fewstep eval: report.json, report.md, report.html. Numbers that were not measured "
        "alike get columns of their own, and a note says what differs.",
    )
    parser.add_argument("reports", metavar="DIR", nargs="+", type=str, help="folders that fewstep eval wrote")
    parser.add_argument("--out", type=str, required=True, help="folder for the joined report")
    parsed = parse(parser, words)
    print(compare(parsed.reports, parsed.out).table())
