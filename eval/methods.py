"""One table and one picture of all methods on the embedded teachers, in cells that are run one by one.

    python -m fewstep.eval.methods                              what is missing or stale, then table and picture
    python -m fewstep.eval.methods --list                       every cell, its state, the calls kept of its training
    python -m fewstep.eval.methods --list --calls               the same; calls of the others are counted (minutes)
    python -m fewstep.eval.methods --only 'sid*' --seeds 0 1 2  some cells, by their names
    python -m fewstep.eval.methods --table                      table and picture alone, without running anything
    python -m fewstep.eval.methods --table --readme docs/methods.md   and what ships: the page, what auto chooses from

A cell is one student (or teacher) at one step count; ``eval/methods.yaml`` lists them. Its training is a shipped
recipe; it may be killed at any moment, and the same command goes on with it. Results are kept in ``eval/results``,
bound by a hash to recipe, teacher and judge: a cell whose recipe has changed since is stale, and run again.
"""

from __future__ import annotations

import fnmatch
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fewstep.config.parsing import Parser, parse, with_values
from fewstep.data.durable import write_durably, write_text_durably
from fewstep.errors import Interrupted, UserError
from fewstep.eval.benchmark.best import SHIPPED, choices_table, evidence_of
from fewstep.eval.benchmark.cell_results import RESULTS, read_result, state, why_stale, write_result
from fewstep.eval.benchmark.cell_runs import Runner, network_calls
from fewstep.eval.benchmark.cells import Cell, CellPlan, read_plan
from fewstep.eval.benchmark.comparison import Comparison, compare, insert

PICTURE = "methods.png"
PAGE = "page whose table is made anew, with what fewstep distill auto chooses from: docs/methods.md"


def chosen(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells whose names fit one of the patterns; all, where there is none.

    Raises:
        UserError: a pattern fits no cell.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(cell.name, pattern) for cell in cells):
            raise UserError(f"--only {pattern!r} fits no cell; --list names them")
    return [cell for cell in cells if not patterns or any(fnmatch.fnmatchcase(cell.name, p) for p in patterns)]


def run(cells: Sequence[Cell], results: Path, work: Path) -> None:
    """Run the cells that are missing or stale, and keep each as soon as it is finished.

    Args:
        cells: to have in the end.
        results: folder of what is kept.
        work: folder of the trainings.
    """
    runner = Runner(work)
    for number, cell in enumerate(cells, 1):
        result = read_result(results, cell)
        if result is not None and (stale := why_stale(cell, result)) is None:
            continue
        print(f"[{number}/{len(cells)}] {cell.file}" + (f": {stale}" if result is not None else ""), flush=True)
        started = time.perf_counter()
        result, images = runner.run(cell)
        write_result(results, cell, result, images if cell.seed == 0 else None)
        print(f"  FD {result.metrics['fd_test']:.3f}, {time.perf_counter() - started:.0f} s", flush=True)


def show(cells: Sequence[Cell], results: Path, count: bool = False) -> None:
    """The cells with their state and the network calls of their trainings, in samples.

    Args:
        cells: to show.
        results: folder of what is kept, calls as well.
        count: count them, where none are kept of the present recipe; that takes seconds for each.
    """
    known: dict[str, float] = {}
    states = {cell.file: state(results, cell) for cell in cells}
    for cell in cells:
        if cell.training is not None and states[cell.file] == "done" and (kept := read_result(results, cell)):
            known[cell.training.title] = _total(kept.calls)
    for cell in cells:
        planned = ""
        if cell.training is not None:
            title = cell.training.title
            if count and title not in known:
                known[title] = _total(network_calls(cell.training))
            planned = f"{known[title]:>12,.0f} calls" if title in known else ""
        print(f"{states[cell.file]:8}{cell.file:44}{planned}", flush=True)


def _total(calls: Mapping[str, Mapping[str, float]]) -> float:
    return sum(sum(kinds.values()) for kinds in calls.values())


def publish(
    plan: CellPlan, results: Path, readme: Path | None = None, num: int | None = None, best: Path | None = None
) -> str:
    """Make table and picture anew from what is kept of all cells and seeds; the table goes into a document, too.

    Args:
        plan: the list of cells.
        results: folder of what is kept.
        readme: the document.
        num: samples in every row.
        best: file of what ``fewstep distill auto`` chooses from.
    """
    comparison = compare(plan.cells(seeds_kept(plan, results), num), results)
    table = page_table(comparison)
    picture = comparison.picture(results)
    write_durably(results / PICTURE, lambda path: picture.save(path, format="PNG", optimize=True))
    if best is not None:
        write_text_durably(best, evidence_of(comparison).text())
    if readme is not None:
        write_text_durably(readme, insert(readme.read_text(encoding="utf-8"), table))
    return table


def page_table(comparison: Comparison) -> str:
    """The table of all methods, and below it what ``fewstep distill auto`` chooses."""
    evidence = evidence_of(comparison)
    return "\n\n".join([comparison.markdown(), *([choices_table(evidence)] if evidence.candidates else [])])


def seeds_kept(plan: CellPlan, results: Path) -> list[int]:
    """The seeds that any result is of, or the list asks for."""
    kept = {int(path.stem.rpartition(".seed")[2]) for path in results.glob("*.seed*.json")}
    return sorted(kept | {seed for training in plan.trainings for seed in training.seeds})


def parser() -> Parser:
    """Of this file's command line."""
    made = Parser(prog="python -m fewstep.eval.methods", description=__doc__)
    made.add_argument("--only", type=str, nargs="+", default=[], metavar="CELL", help="names, or patterns as 'sid*'")
    made.add_argument("--seeds", type=int, nargs="+", default=None, help="of the trainings; default those of the list")
    made.add_argument("--num", type=int | None, default=None, help="samples in every row; default the list's")
    made.add_argument("--threads", type=int, default=1, help="to compute with; times are compared of one")
    made.add_argument("--out", type=Path, default=Path("runs/methods"), help="folder of the trainings")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of what is kept of finished cells")
    made.add_argument("--readme", type=Path | None, default=None, help=PAGE)
    made.add_argument("--list", type=bool, default=False, help="show the cells instead of running them")
    made.add_argument("--calls", type=bool, default=False, help="with --list: count the calls that nothing is kept of")
    made.add_argument("--table", type=bool, default=False, help="make table and picture without running anything")
    return made


def main(words: Sequence[str] | None = None) -> int:
    """The command line of this file. Returns the exit code."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fewstep").setLevel(logging.WARNING)
    try:
        asked = parse(parser(), with_values(sys.argv[1:] if words is None else words, {"list", "table", "calls"}))
        if asked.threads < 1 or (asked.num or 1) < 1 or min(asked.seeds or [0]) < 0:
            raise UserError("--threads and --num must be at least 1, and --seeds at least 0")
        torch.set_num_threads(asked.threads)
        plan = read_plan()
        if asked.num not in (None, plan.num) and asked.results == RESULTS:
            raise UserError(f"{RESULTS} holds cells of {plan.num} samples: with another --num give --results DIR, too")
        cells = chosen(plan.cells(asked.seeds, asked.num), asked.only)
        if asked.list:
            show(cells, asked.results, asked.calls)
            return 0
        if not asked.table:
            run(cells, asked.results, asked.out)
        # What ships is made of the committed results alone, together with the page that shows them.
        best = SHIPPED if asked.readme is not None and asked.results == RESULTS else None
        print(publish(plan, asked.results, asked.readme, asked.num, best))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Interrupted):
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
