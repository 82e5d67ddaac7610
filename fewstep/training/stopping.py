"""Stopping before the end: a signal lets the step be finished, and all processes stop after the same one.

Long work between two steps (a sample grid) is given up in its middle, on all processes at the same place.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from fewstep.errors import Interrupted
from fewstep.training.distributed import Processes, host_group

_AGAIN = 1.0  # seconds after which a second Ctrl-C is another one: launchers pass on what the processes hear themselves


class Stopping:
    """Whether the user, or the machine, wants a run to stop.

    Args:
        processes: this process among all.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._signal: int | None = None
        self._since = 0.0
        # Over the hosts' network: to ask after every step must not make a host wait for its device.
        self._group = host_group() if processes.count > 1 else None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """In this block SIGINT and SIGTERM are noted; a second Ctrl-C ends it with ``KeyboardInterrupt``.

        A signal that comes after the last question is given to whoever handles signals after the block.
        """
        try:
            before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever runs the loop there handles signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._signal is not None:
            signal.raise_signal(self._signal)

    def agreed(self) -> bool:
        """Whether all processes stop now, because one was told to; each of them must ask after every step."""
        return self._told(False)[0]

    def pause(self) -> None:
        """Asked again and again in the course of :meth:`of_main`, by whoever works: raises :class:`Interrupted`."""
        if self.agreed():
            raise Interrupted

    def of_main(self, work: Callable[[], object], together: bool = False) -> None:
        """Long ``work`` of the main process, which the others wait for; it asks :meth:`pause` wherever it can be left.

        Args:
            work: of the main process.
            together: the others work, too, and ask as often, but for what the main process does after them.

        Raises:
            Interrupted: on every process, where one of them was told to stop before the work was done.
        """
        main = self.processes.rank == 0
        if main or together:
            work()
        over = self._group is None
        while not over:
            stop, over = self._told(main)
            if stop and not over:
                raise Interrupted

    def _told(self, over: bool) -> tuple[bool, bool]:
        """Whether any process was told to stop, and whether any says that its work is over."""
        told = torch.tensor([self._signal is not None, over], dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
        return bool(told[0]), bool(told[1])

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._since = number, now
        elif number == signal.SIGINT and now - self._since > _AGAIN:
            raise KeyboardInterrupt
