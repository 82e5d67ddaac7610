"""How the samples of a step are shared out among processes, also where a run goes on with another number of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.config.run import RunConfig
from fewstep.errors import UserError
from fewstep.training.run_folder import read_config


@dataclass(frozen=True)
class Share:
    """What each process does in a step: ``micro_batches`` times ``batch_size`` samples."""

    batch_size: int
    micro_batches: int
    processes: int

    @classmethod
    def of(cls, config: RunConfig, processes: int) -> Share:
        """As the settings of a run say."""
        return cls(config.batch_size, config.gradient_accumulation_steps, processes)

    @property
    def samples(self) -> int:
        """Of a step, on all processes."""
        return self.batch_size * self.micro_batches * self.processes

    @property
    def flags(self) -> str:
        """That ask for it."""
        return f"--batch_size {self.batch_size} --gradient_accumulation_steps {self.micro_batches}"

    def indices(self, rank: int, micro: int) -> range:
        """Of one process's micro-batch among the samples of a step: a micro-batch of all processes lies together."""
        first = (micro * self.processes + rank) * self.batch_size
        return range(first, first + self.batch_size)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: how many samples its steps have, and which settings first asked for that."""
        return {"samples": self.samples, "given": [self.batch_size, self.micro_batches]}


def kept_batch(config: RunConfig, state: dict[str, Any], processes: int) -> tuple[RunConfig, str]:
    """The settings with which a run goes on: on another number of processes a step has as many samples as before.

    Args:
        config: as it was given.
        state: of the checkpoint.
        processes: that go on with it.

    Returns:
        Settings with a batch size and a number of micro-batches that keep the samples, and one line for people where
        they are other ones than were given, else "".

    Raises:
        UserError: another batch is asked for than that of the run, or so many processes cannot share it equally.
    """
    out, asked = Path(config.out), Share.of(config, processes)
    theirs = read_config(out)
    begun = theirs["batch_size"], theirs["gradient_accumulation_steps"]
    batch = state.get("batch")
    if batch is None:  # of an earlier version
        refuse_other_batch(out, state, asked)
        batch = {"samples": Share(*begun, processes).samples, "given": begun}
    samples = batch["samples"]
    if asked.samples == samples:
        return config, ""
    shared = shared_out(samples, processes, asked.batch_size, begun[1] if config.couples_samples else None)
    if shared is None:
        counts = range(min(processes, samples) - 1, 0, -1)
        fewer = (shared_out(samples, n, asked.batch_size, begun[1] if config.couples_samples else None) for n in counts)
        one = next(share for share in fewer if share is not None)
        raise UserError(
            f"--resume: a step of the run in {out} has {samples} samples, which {processes} processes cannot share "
            f"equally: start {one.processes} with {one.flags}"
        )
    if (asked.batch_size, asked.micro_batches) not in (begun, tuple(batch["given"])):
        raise UserError(
            f"--resume: a step of the run in {out} has {samples} samples, and {asked.flags} on {_many(processes)} are "
            f"{asked.samples}: give {shared.flags}, or choose another --out"
        )
    changed = replace(config, batch_size=shared.batch_size, gradient_accumulation_steps=shared.micro_batches)
    return changed, f"a step keeps its {samples} samples on {_many(processes)}: {shared.flags}"


def shared_out(samples: int, processes: int, batch_size: int, micro_batches: int | None = None) -> Share | None:
    """The fewest micro-batches of at most ``batch_size`` samples that share a step's samples equally.

    With ``micro_batches`` there are just as many, whatever their size. None where there is no such share.
    """
    each, rest = divmod(samples, processes)
    if rest:
        return None
    if micro_batches is not None:
        return None if each % micro_batches else Share(each // micro_batches, micro_batches, processes)
    count = next(count for count in range(1, each + 1) if each % count == 0 and each // count <= batch_size)
    return Share(each // count, count, processes)


def refuse_other_batch(out: Path, state: dict[str, Any], share: Share) -> None:
    """Raises :class:`UserError` where the steps of a checkpoint had other samples than a step has now."""
    if "batch" not in state:  # of an earlier version
        if state["processes"] != share.processes:
            raise UserError(
                f"the run in {out} was begun by {_many(state['processes'])}, and an earlier version did not write down "
                f"how many samples its steps have: go on with {state['processes']}"
            )
    elif state["batch"]["samples"] != share.samples:
        raise UserError(f"a step of the run in {out} has {state['batch']['samples']} samples, not {share.samples}")


def _many(processes: int) -> str:
    return f"{processes} process{'es' * (processes != 1)}"
