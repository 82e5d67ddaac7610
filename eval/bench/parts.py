"""The parts of `fewstep bench`, and running some of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.errors import UserError
from fewstep.eval.bench import calls, demo, goals, kernels, peers, steps
from fewstep.eval.bench.table import Table, write
from fewstep.eval.bench.timing import machine


@dataclass(frozen=True)
class Options:
    """How a part is measured.

    Attributes:
        device: on which.
        folder: for files that are needed on the way.
        full: whether it may take its time.
        compiled: whether kernels are compared with compiled closed forms.
    """

    device: torch.device
    folder: Path
    full: bool = False
    compiled: bool = False


#: What `--part` takes.
PARTS: dict[str, Callable[[Options], list[Table]]] = {
    "kernels": lambda told: [kernels.measure(told.device, full=told.full, compiled=told.compiled)],
    "calls": lambda _told: [calls.measure()],
    "steps": lambda told: [
        steps.measure(told.device, told.folder / "cases", blocks=9 if told.full else 3),
        peers.measure(told.device, told.folder / "peers", blocks=9 if told.full else 3),
    ],
    "goals": lambda told: [goals.measure(told.device, full=told.full, compiled=told.compiled)],
    "demo": lambda told: [demo.measure(told.device, told.folder, cycles=10 if told.full else 2)],
}


def bench(
    parts: Sequence[str],
    out: Path,
    device: torch.device,
    *,
    full: bool = False,
    compiled: bool = False,
    threads: int = 1,
) -> Iterator[tuple[str, list[Table]]]:
    """Measure some parts one after the other, and write each as ``OUT/PART.json`` and ``OUT/PART.md`` when it is done.

    Args:
        parts: some of :data:`PARTS`.
        out: folder of the files.
        device: on which.
        full: more blocks and larger shapes.
        compiled: kernels against what torch.compile makes of the closed forms, too.
        threads: of torch on the CPU.

    Raises:
        UserError: there is no such part.
    """
    for part in parts:
        if part not in PARTS:
            raise UserError(f"--part is one of {', '.join(PARTS)}, not {part!r}")
    with _threads(threads):
        for part in parts:
            with tempfile.TemporaryDirectory() as folder:
                tables = PARTS[part](Options(device, Path(folder), full, compiled))
            write(tables, machine(device), part, out)
            yield part, tables


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
