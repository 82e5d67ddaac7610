"""Pairs of a tiny teacher made by processes of their own, for tests that need several, or one to kill.

    python tests/tiny_pairs.py OUT    OUT/alone, OUT/together (two processes that know of each other), OUT/apart (two
                                      that do not) and OUT/killed (killed twice between its shards)

All processes are forked from one that has imported everything and loaded nothing.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_pipelines import tiny_dit

from fewstep.programs.pairs import make_pairs

SETTINGS = {"num": 42, "teacher_steps": 6, "batch_size": 2, "shard_size": 4, "classes": "0-4", "cpu": True}


def start(out: Path, environment: dict[str, str] | None = None, **settings) -> int:
    """Make pairs in a forked process; returns its id."""
    process = os.fork()
    if process == 0:
        os.environ.update(environment or {})
        make_pairs(tiny_dit(), out=str(out), **SETTINGS, **settings)
        if dist.is_initialized():
            dist.destroy_process_group()
        os._exit(0)
    return process


def wait(*processes: int) -> None:
    for process in processes:
        if os.waitpid(process, 0)[1] != 0:
            sys.exit("a process failed")


def main(out: Path) -> None:
    wait(start(out / "alone"))

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    wait(*(start(out / "together", {**launch, "RANK": r, "LOCAL_RANK": r}) for r in ("0", "1")))
    wait(*(start(out / "apart", rank=rank, world=2) for rank in (1, 0)))

    hits = 0
    for shards in (1, 5):
        process = start(out / "killed", resume=shards > 1)
        while len(list((out / "killed").glob("shard_*"))) < shards:
            time.sleep(0.001)
        os.kill(process, signal.SIGKILL)
        hits += os.WIFSIGNALED(os.waitpid(process, 0)[1])
    wait(start(out / "killed", resume=True))
    print(hits)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
