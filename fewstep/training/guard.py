"""Sees to it that all numbers of a run stay finite; where one is not, it says which, and since when."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.training.distributed import Processes
from fewstep.training.finite import any_not_finite, find_held, find_in_step
from fewstep.training.method import Method
from fewstep.training.optimization import Faults, RoleOptimizer
from fewstep.training.verdict import Trouble

logger = logging.getLogger("fewstep")

#: So many steps at most are played again in search of a number of the log that was not finite.
_TRACED = 20


class Guard:
    """The guard of one run. What it answers is the same on all processes, which ask it together.

    Args:
        method: of the run.
        optimizers: of its trained roles, by name.
        faults: where they note gradients that are not finite.
        processes: this process among all.
        held: all tensors of a checkpoint, by file and name.
        batches: the micro-batches of a step, made again.
        traces: whether a step can be played again here, in search of the first tensor that is not finite.
    """

    def __init__(
        self,
        method: Method,
        optimizers: Mapping[str, RoleOptimizer],
        faults: Faults,
        processes: Processes,
        held: Callable[[], Mapping[str, Mapping[str, Tensor]]],
        batches: Callable[[int], Iterable[Batch]],
        traces: bool = True,
    ) -> None:
        self.method, self.optimizers, self.faults, self.processes = method, optimizers, faults, processes
        self.held, self.batches, self.traces = held, batches, traces

    def look(self, done: int) -> Trouble | None:
        """What is not finite after ``done`` steps in all that a checkpoint holds, or was not in a gradient.

        It waits for the device. A gradient alone is said, and no more, where such updates are left out.
        """
        held = any_not_finite(tensor for values in self.held().values() for tensor in values.values())
        steps = list(self.faults.first.values())
        flags = torch.stack([held.to(steps[0]), *steps])
        if self.processes.count > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        held_any, *first = flags.tolist()
        if not held_any and max(first) < 0:
            return None
        noted = [(step, role) for role, step in zip(self.faults.first, first, strict=True) if step >= 0]
        step, role = min(noted, default=(done - 1, ""))
        where, good = self._where(step)
        what = f"the gradient of the {role} was not finite in step {step}" if role else f"not finite after step {step}"
        words = f"{what} ({where})" if where else what
        if not held_any and not self.faults.halting:
            logger.warning("%s; that update was left out", words)
            self.faults.clear()
            return None
        return Trouble("nan", "training", step, good, words)

    def traced(self, trouble: Trouble, done: int) -> Trouble:
        """With words for where a number of the log came to be not finite, which was after the line before it."""
        for step in range(done - 1, max(trouble.good, done - _TRACED) - 1, -1):
            where, good = self._where(step)
            if where:
                return replace(trouble, good=min(good, trouble.good), words=f"{trouble.words} ({where})")
        return trouble

    def _where(self, step: int) -> tuple[str, int]:
        """Words for the first tensor that is not finite, and the last step from which going on might help."""
        if not self.traces:
            return "", step
        states = {name: optimizer.state() for name, optimizer in self.optimizers.items()}
        held = self.processes.first(find_held(self.method.roles, states))
        if held is not None:
            role, words = held
            return words, step if role in self.held() else -1
        parameters = {name: dict(optimizer.role.named_parameters()) for name, optimizer in self.optimizers.items()}
        return self.processes.first(find_in_step(self.method, step, self.batches(step), parameters)) or "", step
