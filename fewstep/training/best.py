"""The best evaluation of a run: its checkpoint, which is kept, and for how long there has been no better one.

``OUT/checkpoint_best`` has the checkpoint as ``step_00000500/``, its files shared with ``OUT/checkpoints`` where the
disk can do that, and ``best.json``, which says what it is the best of. That file is written last and removed first, so
that there is a whole checkpoint whenever there is the file.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewstep.data.durable import flush, write_text_durably
from fewstep.errors import UserError, one_line
from fewstep.networks.roles import Role
from fewstep.reading import misfit, read_json
from fewstep.training import checkpoint
from fewstep.training.distributed import Processes
from fewstep.training.held import Holding

logger = logging.getLogger("fewstep")

_FILE = "best.json"
_KINDS: Any = {"metric": str, "highest": bool, "samples": int, "evaluator": str, "step": int, "value": float}


@dataclass(frozen=True)
class Measure:
    """The number by which evaluations are compared.

    Attributes:
        metric: its name.
        highest: whether its highest value is the best; else its lowest.
        samples: that it is made of.
        evaluator: the name of who makes it.
    """

    metric: str
    highest: bool
    samples: int
    evaluator: str


@dataclass(frozen=True)
class Mark:
    """An evaluation that is the best so far."""

    measure: Measure
    step: int
    value: float

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self.measure), "step": self.step, "value": self.value}

    @classmethod
    def of_json(cls, table: Mapping[str, Any]) -> Mark:
        """What :meth:`as_json` gave.

        Raises:
            ValueError: it is something else.
        """
        if wrong := misfit(table, _KINDS):
            raise ValueError(wrong)
        values = {name: table[name] for name in _KINDS}
        step, value = values.pop("step"), values.pop("value")
        return cls(Measure(**values), step, value)

    def __str__(self) -> str:
        return f"{self.measure.metric} {self.value:.4g} in step {self.step}"


class Best:
    """The best evaluation so far; it is the same on all processes.

    Args:
        out: the run's folder.
        measure: by which evaluations are compared; None where the run makes none, and keeps what there is.
        patience: so many evaluations without a better one are enough; 0 for any number.
        processes: this process among all; the main one reads and writes.

    Attributes:
        mark: the best evaluation; None where no number was finite yet.
        since: how many there were after it.
    """

    def __init__(self, out: Path, measure: Measure | None, patience: int, processes: Processes) -> None:
        self.folder, self.checkpoints = out / "checkpoint_best", out / "checkpoints"
        self.measure, self.patience, self.processes = measure, patience, processes
        self.mark: Mark | None = None
        self.since = 0

    def note(self, step: int, numbers: Mapping[str, float]) -> bool:
        """Whether the evaluation of a step is the best so far; then its checkpoint is to be written and kept."""
        assert self.measure is not None  # as there was an evaluation
        value = numbers[f"eval/{self.measure.metric}"]
        before = self.mark.value if self.mark is not None else -math.inf if self.measure.highest else math.inf
        if math.isfinite(value) and (value > before if self.measure.highest else value < before):
            self.mark, self.since = Mark(self.measure, step, value), 0
            return True
        self.since += 1
        return False

    @property
    def enough(self) -> bool:
        """Whether the run ends, because there was no better evaluation for so long."""
        return self.measure is not None and 0 < self.patience <= self.since

    def why_enough(self, step: int, max_steps: int) -> str:
        """In one line."""
        best = f"the best was {self.mark}" if self.mark is not None else "none gave a finite number"
        return (
            f"the run ends after step {step} of {max_steps}: the last {self.since} evaluations were no better, {best} "
            "(--eval_patience)"
        )

    def keep(self) -> None:
        """Keep the checkpoint of the best evaluation; the main process alone calls it.

        Raises:
            UserError: the disk is full or does not take it; the best one before is untouched.
        """
        assert self.mark is not None
        checkpoint.give_second_place(self.checkpoints, self.mark.step, self.folder)
        try:
            write_text_durably(self.folder / _FILE, json.dumps(self.mark.as_json(), indent=1))
        except OSError as error:
            raise UserError(
                f"{self.folder / _FILE} could not be written ({error}); make room on the disk, then --resume"
            ) from error
        checkpoint.remove_all_but(self.folder, self.mark.step)

    def load(self, role: Role, roles: dict[str, Role], holding: Holding) -> str:
        """Give a role the weights that it had at the best evaluation. Returns one line for people.

        Args:
            role: of the run.
            roles: all of them.
            holding: how the processes hold them.

        Raises:
            UserError: the checkpoint of that evaluation is damaged.
        """
        kept = self.processes.of_main(self._read)
        if kept is None:
            return "no evaluation gave a finite number: the last student is written, in spite of --export_best"
        found = self.processes.of_main(lambda: checkpoint.find_step(self.folder, kept.step))
        role.load_state_dict(holding.tensors(found, roles)[role.name])
        return f"the student that is written is the best one: {kept}"

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"best": None if self.mark is None else self.mark.as_json(), "since": self.since}

    def resume(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Go on after a ``step`` whose checkpoint has this state; what came after it is forgotten."""
        best = None if state is None else state["best"]
        self.mark = None if best is None else Mark.of_json(best)
        self.since = 0 if state is None else state["since"]
        if self.measure is not None and self.mark is not None and self.mark.measure != self.measure:
            self._begin_anew(f"other evaluations than before: that of {self.mark} is no longer the best")
        if not self.processes.of_main(lambda: self._settled(step)):
            self._begin_anew(f"the checkpoint of the best evaluation ({self.mark}) is gone")

    def _begin_anew(self, why: str) -> None:
        if self.processes.rank == 0:
            logger.warning("%s; the next one is the best so far", why)
        self.mark, self.since = None, 0

    def _settled(self, step: int) -> bool:
        """Whether what is kept is the best evaluation of a run that goes on after ``step``, or there is none yet."""
        kept = self._read()
        if kept is not None and (kept.step > step or not checkpoint.looks_whole(self.folder, kept.step)):
            (self.folder / _FILE).unlink()
            flush(self.folder)
            kept = None
        checkpoint.remove_all_but(self.folder, None if kept is None else kept.step)
        if self.mark in (None, kept):
            return True
        assert self.mark is not None
        if not checkpoint.looks_whole(self.checkpoints, self.mark.step):
            return False
        self.keep()  # a kill came before, or what was kept came after the checkpoint that is gone on from
        return True

    def _read(self) -> Mark | None:
        try:
            return Mark.of_json(read_json(self.folder / _FILE))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / _FILE} is not what was written ({one_line(error)}); remove it") from error


def misfit_of_state(state: Any) -> str | None:
    """What of a checkpoint's state of evaluations (:meth:`Best.state`) is not as it should be; None where all is."""
    if state is None:  # of an earlier version
        return None
    best = state.get("best")
    return misfit(state, {"best": (dict, type(None)), "since": int}) or (None if best is None else misfit(best, _KINDS))
