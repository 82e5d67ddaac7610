"""``fewstep bench``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.config.parsing import Parser, parse, with_values
from fewstep.errors import UserError
from fewstep.eval.bench.parts import PARTS, bench

_ABOUT = "Measure on this machine what the core costs; exit 1 where something is not as it should be."


def run(words: Sequence[str]) -> int:
    """Print the tables of one part or of all. Returns the exit code: 1 where something is not as it should be."""
    parser = Parser(prog="fewstep bench", description=_ABOUT)
    parser.add_argument("--part", type=str | None, default=None, help=f"one of {', '.join(PARTS)}; default all")
    parser.add_argument("--out", type=str, default="runs/bench", help="folder for tables and JSON")
    parser.add_argument("--full", type=bool, default=False, help="more blocks and larger shapes; minutes for each part")
    parser.add_argument(
        "--compiled", type=bool, default=False, help="kernels against torch.compile of the closed forms, too"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--cpu", type=bool, default=False, help="stay on the CPU even where there is a GPU")
    parsed = parse(parser, with_values(words, {"full", "compiled", "cpu"}))
    if parsed.threads < 1:
        raise UserError(f"--threads must be at least 1, not {parsed.threads}")
    device = torch.device("cuda" if torch.cuda.is_available() and not parsed.cpu else "cpu")
    parts = list(PARTS) if parsed.part is None else [parsed.part]
    failed = False
    how = {"full": parsed.full, "compiled": parsed.compiled, "threads": parsed.threads}
    for _, tables in bench(parts, Path(parsed.out), device, **how):
        for table in tables:
            print(table.markdown(), end="\n\n", flush=True)
            failed = failed or bool(table.failures)
    return int(failed)
