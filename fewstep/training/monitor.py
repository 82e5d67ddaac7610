"""What a run says while it runs: ``metrics.jsonl``, a progress bar, and accelerate's trackers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from fewstep.data.durable import write_text_durably
from fewstep.training.trackers import Trackers
from fewstep.training.verdict import read_log

#: Shown beside the progress bar: the numbers that tell whether training goes well.
_SHOWN = {
    "critic/lag": "lag",
    "student/gradient": "|g|",
    "student/x0_mean": "mean",
    "student/x0_std": "std",
    "student/teacher_std": "teacher std",
}


class Monitor:
    """Log of one run; silent on all but the main process.

    Args:
        out: the run's folder.
        max_steps: length of the progress bar.
        accelerator: whose trackers get every line too; its main process is the one that writes.
    """

    def __init__(self, out: Path, max_steps: int, accelerator: Accelerator) -> None:
        self.path = out / "metrics.jsonl"
        self._trackers = Trackers(accelerator)
        self._active = accelerator.is_main_process
        self._max_steps = max_steps
        self._bar: tqdm[Any] | None = None
        self._postfix: dict[str, str] = {}
        self._file: IO[str] | None = None
        self._started = time.monotonic()

    def start_trackers(self, settings: Mapping[str, Any]) -> None:
        """Start the trackers that the launch asked for, and tell them the run's settings."""
        self._trackers.start(self.path.parent, settings)

    def resume(self, step: int) -> list[dict[str, float]]:
        """Forget the lines after ``step``; they will be written again. Returns the others, on the main process."""
        if not self._active or not self.path.exists():
            return []
        if self._file is not None:  # of a run that goes back; the next line opens what is left
            self._file.close()
            self._file = None
        kept = [row for row in read_log(self.path) if row["step"] <= step]
        write_text_durably(self.path, "".join(f"{json.dumps(row)}\n" for row in kept))
        return kept

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of one step, after ``step`` steps are done."""
        if not self._active:
            return
        row = {"step": step, "seconds": round(time.monotonic() - self._started, 2), **values}
        self._open().write(json.dumps(row) + "\n")
        self._trackers.log(step, values)
        self._postfix |= {short: f"{values[name]:.3g}" for name, short in _SHOWN.items() if name in values}
        self._progress(step).set_postfix(self._postfix)

    def show(self, step: int, picture: Path) -> None:
        """Hand the sample grid of a step to the trackers."""
        if self._active:
            self._trackers.log_picture(step, "samples", picture)

    def advance(self, step: int) -> None:
        """Move the progress bar to ``step`` steps done."""
        if self._active:
            bar = self._progress(step)
            bar.update(step - bar.n)

    def flush(self) -> None:
        """Make what was logged durable, so that no checkpoint is ahead of its log."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """End the log and the trackers."""
        self._trackers.finish()
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> IO[str]:
        if self._file is None:
            self._file = self.path.open("a")
        return self._file

    def _progress(self, step: int) -> tqdm[Any]:
        if self._bar is None:
            self._bar = tqdm(total=self._max_steps, initial=max(step - 1, 0), desc="distill", unit="step")
        return self._bar
