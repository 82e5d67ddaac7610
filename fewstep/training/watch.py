"""What becomes of a run in which something goes wrong: it is said, the run ends, or it goes back and on more slowly.

``OUT/checkpoints/rollbacks.json`` has the roll-backs of a run, so that one that is killed and resumed goes on as slowly
and with the same random draws as the undisturbed one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fewstep.config.run import RunConfig
from fewstep.data.durable import write_text_durably
from fewstep.errors import UserError, one_line
from fewstep.reading import misfit, read_json
from fewstep.training import checkpoint
from fewstep.training.distributed import Processes
from fewstep.training.verdict import History, Trouble, troubles

logger = logging.getLogger("fewstep")

#: Learning rates are multiplied by this at every roll-back.
SLOWER = 0.5
#: What ends a run, by ``--stop_on``.
ENDING = {"nan": ("nan",), "collapse": ("nan", "constant", "alike", "far out", "explosion", "standstill"), "never": ()}
#: The draws of a run that was rolled back are those of a seed that is so far away from its own.
_SEEDS_APART = 2**32


def _misfit(rollback: Any) -> str | None:
    return misfit(rollback, {"from": int, "to": int, "why": str})


class Watch:
    """Judges one run while it goes on. What it answers is the same on all processes.

    Args:
        config: of the run.
        checkpoints: its folder of them.
        processes: this process among all; the main one reads and writes.
    """

    def __init__(self, config: RunConfig, checkpoints: Path, processes: Processes) -> None:
        self.config, self.checkpoints, self.processes = config, checkpoints, processes
        self.rollbacks: list[dict[str, Any]] = []
        self._history = History()
        self._said: set[tuple[str, str]] = set()

    @property
    def slowed(self) -> float:
        """What learning rates are multiplied by."""
        return SLOWER ** len(self.rollbacks)

    @property
    def seed(self) -> int:
        """Of the batches: another one after each roll-back, or the same steps might go wrong in the same way."""
        return self.config.seed + len(self.rollbacks) * _SEEDS_APART

    def resume(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Go on after these lines of the log, and after the roll-backs that were noted."""
        self._history, self._said = History(rows), set()
        self.rollbacks = self.processes.of_main(self._read)

    def look(self, row: Mapping[str, float]) -> Trouble | None:
        """Say what is newly wrong with a line of the log. Returns what ends the run, None where it goes on."""
        return self.processes.of_main(lambda: self._look(row))

    def way_back(self, trouble: Trouble, step: int) -> checkpoint.Found | None:
        """The checkpoint from before a trouble that is gone back to; None where the run is to end.

        Newer ones are removed, and the roll-back is noted, in this order: what is killed in between does it again.
        """
        return self.processes.of_main(lambda: self._way_back(trouble, step))

    def _read(self) -> list[dict[str, Any]]:
        file = self._file
        if not file.exists():
            return []
        try:
            noted = read_json(file)
            wrong = "it is no list" if not isinstance(noted, list) else next(filter(None, map(_misfit, noted)), None)
        except (OSError, ValueError) as error:
            wrong = one_line(error)
        if wrong is not None:
            raise UserError(f"{file} is not what was written ({wrong}); remove it to go on at the full learning rates")
        return list(noted)

    def _look(self, row: Mapping[str, float]) -> Trouble | None:
        self._history.add(row)
        now = troubles(self._history)
        for one in now:
            if (one.kind, one.what) not in self._said:
                logger.warning("%s", one.words)
        self._said = {(one.kind, one.what) for one in now}
        return next((one for one in now if one.kind in ENDING[self.config.stop_on]), None)

    def _way_back(self, trouble: Trouble, step: int) -> checkpoint.Found | None:
        # What stands still would stand as still at a lower learning rate.
        if len(self.rollbacks) >= self.config.rollbacks or trouble.kind == "standstill":
            return None
        found = self._last_good(trouble, step)
        if found is None:
            return None
        checkpoint.remove_after(self.checkpoints, found.state["step"])
        noted = [*self.rollbacks, {"from": step, "to": found.state["step"], "why": trouble.words}]
        write_text_durably(self._file, json.dumps(noted, indent=1))
        logger.warning(
            "%s; back to the checkpoint of step %d, and on with %g times the learning rates and other random draws "
            "(roll-back %d of %d)",
            trouble.words,
            found.state["step"],
            SLOWER ** len(noted),
            len(noted),
            self.config.rollbacks,
        )
        return found

    def _last_good(self, trouble: Trouble, step: int) -> checkpoint.Found | None:
        ends = [trouble.good]
        if self.rollbacks and step <= self.rollbacks[-1]["from"]:  # that one did not help: further back
            ends.insert(0, min(trouble.good, self.rollbacks[-1]["to"] - 1))
        for up_to in ends:
            try:
                return checkpoint.find_latest(self.checkpoints, up_to)
            except UserError:  # it is gone already
                continue
        return None

    @property
    def _file(self) -> Path:
        return self.checkpoints / "rollbacks.json"
