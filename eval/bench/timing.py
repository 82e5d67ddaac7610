"""Times that compare: pieces of work in turn, in blocks, so that a machine that slows down slows all of them.

On a CPU with one thread what counts are the seconds that this process computed: other programs then cost nothing but
cache. With several threads, and on a GPU, those of the clock, waited for.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fewstep.version import __version__


@dataclass(frozen=True)
class Spread:
    """The median of several measurements, and the least and the greatest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def words(self, digits: int = 2) -> str:
        """``1.04 (1.02-1.07)``."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


class Clock:
    """Seconds of a piece of work on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of_process = device.type == "cpu" and torch.get_num_threads() == 1

    def __call__(self, work: Callable[[], object]) -> float:
        """Seconds that ``work`` takes."""
        before = self.now()
        work()
        return self.now() - before

    def now(self) -> float:
        """Seconds so far, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.of_process else time.perf_counter()


def alternate(
    works: Mapping[str, Callable[[], object]], clock: Clock, blocks: int, budget: float = float("inf")
) -> dict[str, list[float]]:
    """Seconds of each piece of work in every block, after one untimed call of each; every second block goes backwards.

    Args:
        works: by name.
        clock: of the device that they run on.
        blocks: how often each is timed.
        budget: seconds of the wall clock after which no further block begins; one is always played.
    """
    began = time.perf_counter()
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for block in range(blocks):
        if block and time.perf_counter() - began > budget:
            break
        for name in list(works) if block % 2 == 0 else list(works)[::-1]:
            seconds[name].append(clock(works[name]))
    return seconds


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """theirs / ours, block by block."""
    return Spread.of([one / other for one, other in zip(theirs, ours, strict=True)])


def machine(device: torch.device) -> dict[str, Any]:
    """What measurements depend on: processor, GPU, versions, threads, and the day."""
    known = {
        "processor": _processor(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fewstep": __version__,
        "date": date.today().isoformat(),
        "clock": "seconds of the process" if Clock(device).of_process else "seconds of the clock",
    }
    if device.type == "cuda":
        known |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return known


def _processor() -> str:
    """Its model, as Linux names it, else its kind."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8", errors="replace").splitlines() if listed.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
