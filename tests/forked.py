"""Several processes of one launch, forked from the test's own, so that the imports are paid once.

They meet over gloo as those of torchrun do, which sets the same variables of the environment.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

_PATIENCE = 240.0  # seconds; a test that needs them has failed


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code; negative, that of the signal that killed it.
        said: on its standard error.
        seconds: after the start.
    """

    code: int
    said: str
    seconds: float


def forked(count: int, work: Callable[[int], object], folder: Path) -> list[Ended]:
    """Run ``work(rank)`` in ``count`` processes of one launch, and wait for all. An int that it gives is the exit code.

    Args:
        count: how many.
        work: of each process, told its rank.
        folder: for what they say.
    """
    if torch.cuda.is_available():
        pytest.skip("a process whose gradients may have used a GPU cannot be forked")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    began, running, ended = time.monotonic(), {}, {}
    for rank in range(count):
        process = os.fork()
        if process == 0:
            _child(rank, count, port, work, folder / f"stderr_{rank}.txt")
        running[process] = rank
    while running:
        for process, rank in list(running.items()):
            waited, status = os.waitpid(process, os.WNOHANG)
            if waited:
                del running[process]
                said = (folder / f"stderr_{rank}.txt").read_text()
                ended[rank] = Ended(os.waitstatus_to_exitcode(status), said, time.monotonic() - began)
            elif time.monotonic() - began > _PATIENCE:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    return [ended[rank] for rank in range(count)]


def well(count: int, work: Callable[[int], object], folder: Path) -> None:
    """As :func:`forked`, where every process must end well."""
    for rank, end in enumerate(forked(count, work, folder)):
        assert end.code == 0, f"process {rank}: {end.said[-3000:]}"


def _child(rank: int, count: int, port: int, work: Callable[[int], object], said: Path) -> None:
    code = 1
    try:
        stream = said.open("w", buffering=1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = stream
        logging.root.handlers.clear()
        for state in (PartialState, GradientState):
            state._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        if count > 1:
            os.environ |= {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1"}
        result = work(rank)
        code = result if isinstance(result, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
