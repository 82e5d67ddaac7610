"""A tiny training run, for tests that need several processes or a process to kill.

Processes are forked from one that has imported everything, so that a restart costs milliseconds.
"""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from pathlib import Path

import torch.distributed as dist
from toys import TinyMethod, make_loop

from fewstep.config.run import RunConfig
from fewstep.training import checkpoint


def train(out: Path, settings: dict) -> None:
    """Of ``settings`` of a run, into ``out``; it goes on where that holds a checkpoint."""
    config = RunConfig(teacher="tiny", out=str(out), lr_warmup_steps=7, ema_decay=0.9, report_to="none", **settings)
    loop = make_loop(TinyMethod(ema=True, renew=5), config)
    if checkpoint.steps_in(loop.checkpoints):
        loop.resume()
    loop.run()
    if dist.is_initialized():
        dist.destroy_process_group()


def start(out: Path, settings: dict) -> int:
    """Train in a forked process; returns its id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            train(out, settings)
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    return process


def kill_and_resume(out: Path, settings: dict, kills: int, seed: int) -> int:
    """Train once undisturbed (out/whole), then once (out/killed) with SIGKILLs at random moments.

    Args:
        out: folder of both.
        settings: of the run.
        kills: how many are tried.
        seed: of their moments.

    Returns:
        How many hit a running process.
    """
    began = time.monotonic()
    if os.waitpid(start(out / "whole", settings), 0)[1] != 0:
        raise AssertionError("the undisturbed run failed")
    # Each kill finds a process: the longest waits together are shorter than the run, and on a machine that has become
    # faster since, no process gets further than its share of the steps.
    longest, share = 0.9 * (time.monotonic() - began) / kills, settings["max_steps"] // (kills + 1)
    moments = random.Random(seed)
    hits = 0

    def done() -> int:
        return max(checkpoint.steps_in(out / "killed" / "checkpoints"), default=0)

    for _ in range(kills):
        process = start(out / "killed", settings)
        moment, last = time.monotonic() + moments.uniform(0, longest), done() + share
        while time.monotonic() < moment and done() < last:
            time.sleep(0.001)
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
            raise AssertionError("a resumed run failed before it was killed")
        hits += os.WIFSIGNALED(status)
    if os.waitpid(start(out / "killed", settings), 0)[1] != 0:
        raise AssertionError("the last resumed run failed")
    return hits
