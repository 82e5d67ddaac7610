"""One fate for all processes of a launch: where one dies or fails, the others end at once, and one line says why.

Who waits in a collective for a process that is gone would wait for hours, or until the launcher of its own machine ends
it. So every process holds a connection to the first one. The system itself closes it when a process dies, however that
comes about, and its keepalive notices within a minute that a machine is gone. No clock decides: a process that is only
slow, or was stopped for a while, is not given up.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from fewstep.errors import UserError, of_the_system, one_line

logger = logging.getLogger("fewstep")

_MEETING = 60.0  # seconds for every process to make its connection
_NEWS = 10.0  # seconds in which a process that failed hears whether another one's end was the reason
_SAME = 1.0  # seconds in which the first process may fail for the same reason as another one, and say so itself
_GOODBYE = 2.0  # seconds in which the others end
_KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6, "TCP_USER_TIMEOUT": 50_000}  # s, s, times, ms
_ADVICE = "all processes have ended; start them again with --resume"


@contextmanager
def shared_fate(accelerator: Accelerator, *orderly: type[BaseException]) -> Iterator[None]:
    """In this block the processes of a launch end together: in order, or at once and with one line.

    Every process must enter it. Where one of them dies, all others are ended. An exception that leaves the block on one
    process ends the others too; it goes on its way on the first process alone, and another one ends here.

    Args:
        accelerator: of the launch; with a single process there is nothing to do.
        *orderly: exceptions that all processes raise together, and leave with in order.

    Raises:
        UserError: the processes cannot reach each other.
    """
    if accelerator.num_processes == 1:
        yield
        return
    fate = _First(accelerator.num_processes) if accelerator.is_main_process else _Other(accelerator.process_index)
    try:
        yield
    except orderly:
        fate.leave()
        raise
    except BaseException as error:
        fate.fail(error)
        raise
    fate.leave()


class _First:
    """The first process: it hears of every other's end, and tells all."""

    def __init__(self, count: int) -> None:
        self._others: dict[Connection[Any, Any], int] = {}
        self._all_met, self._all_left, self._failed = threading.Event(), threading.Event(), threading.Event()
        self._deciding, self._decided = threading.Lock(), False
        key = secrets.token_hex(16)
        near = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
        listener = Listener(("127.0.0.1" if near else "", 0), backlog=count, authkey=key.encode())
        host = "127.0.0.1" if near else os.environ["MASTER_ADDR"]
        broadcast_object_list([(host, listener.address[1], key)])
        threading.Thread(target=self._listen, args=(listener, count), name="fate", daemon=True).start()
        if not self._all_met.wait(_MEETING):
            absent = sorted(set(range(1, count)) - set(self._others.values()))
            raise UserError(f"processes {absent} could not reach process 0 at {host}: open its ports for them")

    def leave(self) -> None:
        self._all_left.wait()
        for other in self._others:
            _say(other, left=True)

    def fail(self, error: BaseException) -> None:
        self._failed.set()
        if not _for_people(error):
            # It may be a collective without a process that died, and then the thread ends this one. Where all have the
            # same reason, this one is the first to give it.
            time.sleep(_NEWS / 2)
        with self._deciding:
            self._decided = True
            self._end_others(one_line(error), _code(error))

    def _listen(self, listener: Listener, count: int) -> None:
        while len(self._others) < count - 1:
            with suppress(AuthenticationError, OSError, EOFError, ValueError):  # a stranger, who is of no account
                other = listener.accept()
                self._others[_kept_alive(other)] = int(other.recv_bytes())
        listener.close()
        self._all_met.set()
        there = set(self._others)
        while there:
            ready = wait(list(there))
            for other in [one for one in there if one in ready]:
                there.discard(other)  # each says one thing, its last
                rank, words = self._others[other], _hear(other)
                if words is None:
                    self._end(f"process {rank} died; {_ADVICE}", 1)
                elif "failed" in words and not self._failed.wait(_SAME):
                    self._end(f"process {rank}: {words['failed']}", words["code"])
        self._all_left.set()

    def _end(self, line: str, code: int) -> None:
        with self._deciding:
            if not self._decided:
                _tell(line)
                self._end_others(line, code)
                os._exit(code)

    def _end_others(self, line: str, code: int) -> None:
        for other in self._others:
            _say(other, ended=line, code=code)
        # A connection with something unread is reset when this process ends, and what was said on it is lost.
        deadline = time.monotonic() + _GOODBYE
        there = set(self._others)
        while there and (ready := wait(list(there), max(0.0, deadline - time.monotonic()))):
            there -= {one for one in there if one in ready and _hear(one) is None}


class _Other:
    """Any other process: it tells the first one of its end, and hears from it of all others'."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        place: list[Any] = [None]
        broadcast_object_list(place)
        host, port, key = place[0]
        try:
            self._first = Client((host, port), authkey=key.encode())
            self._first.send_bytes(str(rank).encode())
        except (OSError, EOFError, AuthenticationError) as error:
            raise UserError(
                f"process {rank} cannot reach process 0 at {host}:{port} ({error}): open its ports"
            ) from error
        _kept_alive(self._first)
        self._watch = threading.Thread(target=self._listen, name="fate", daemon=True)
        self._watch.start()

    def leave(self) -> None:
        _say(self._first, left=True)
        self._watch.join()

    def fail(self, error: BaseException) -> None:
        if not _for_people(error):
            self._watch.join(_NEWS)
            traceback.print_exception(error)
        _say(self._first, failed=one_line(error), code=_code(error))
        self._watch.join()  # which ends this process

    def _listen(self) -> None:
        words = _hear(self._first)
        if words is not None and "left" in words:
            return
        here_first = os.environ.get("LOCAL_RANK") == "0"
        if words is None and (here_first or self.rank == 1):
            _tell(f"process 0 died; {_ADVICE}")
        elif words is not None and here_first:  # on a machine that has not read it yet
            _tell(words["ended"])
        os._exit(1 if words is None else words["code"])


def _say(to: Connection[Any, Any], **words: Any) -> None:
    with suppress(OSError):  # to one who is gone nothing can be said, and the listener knows it
        to.send_bytes(json.dumps(words).encode())


def _hear(of: Connection[Any, Any]) -> dict[str, Any] | None:
    """What is said next; None where nothing will be any more."""
    try:
        return dict(json.loads(of.recv_bytes()))
    except (OSError, EOFError):
        return None


def _kept_alive(connection: Connection[Any, Any]) -> Connection[Any, Any]:
    with socket.socket(fileno=os.dup(connection.fileno())) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):  # not every system lets a program choose
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _tell(line: str) -> None:
    """Log a line of its own, also where another process has just left a bar or half a line in the same terminal."""
    with tqdm.external_write_mode(sys.stderr):
        logger.error(f"\nfewstep: {line}")
    sys.stderr.flush()


def _for_people(error: BaseException) -> bool:
    """Whether an exception says all there is to say in its line; of any other one a traceback is shown."""
    return of_the_system(error) or isinstance(error, UserError | OSError | KeyboardInterrupt | torch.OutOfMemoryError)


def _code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if _for_people(error) else 1
