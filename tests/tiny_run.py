"""A tiny training run as a process of its own, for tests that need several processes or a process to kill.

    python tests/tiny_run.py OUT [--max_steps N ...]               one run, resumed where OUT holds a checkpoint
    torchrun --nproc_per_node 2 tests/tiny_run.py OUT ...          the same on two processes
    python tests/tiny_run.py OUT --kills K                         OUT/whole undisturbed; OUT/killed killed K times

The killed run's processes are forked from one that has imported everything, so that a restart costs milliseconds.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from toys import TinyMethod, make_loop

from fewstep.config.run import RunConfig
from fewstep.training import checkpoint, distributed


def train(out: Path, settings: dict) -> None:
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
        train(out, settings)
        os._exit(0)
    return process


def kill_and_resume(out: Path, settings: dict, kills: int, seed: int) -> int:
    """Train once undisturbed, then once with SIGKILLs at random moments. Returns how many hit a running process."""
    began = time.monotonic()
    if os.waitpid(start(out / "whole", settings), 0)[1] != 0:
        sys.exit("the undisturbed run failed")
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
            sys.exit("a resumed run failed before it was killed")
        hits += os.WIFSIGNALED(status)
    if os.waitpid(start(out / "killed", settings), 0)[1] != 0:
        sys.exit("the last resumed run failed")
    return hits


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--checkpointing_steps", type=int, default=3)
    parser.add_argument("--log_steps", type=int, default=1)
    parser.add_argument("--bucket", type=int, default=distributed._BUCKET, help="elements in one all-reduce")
    settings = vars(parser.parse_args())
    torch.set_num_threads(1)
    out, kills, distributed._BUCKET = settings.pop("out"), settings.pop("kills"), settings.pop("bucket")
    if kills:
        print(kill_and_resume(out, settings, kills, settings["seed"]))
    else:
        train(out, settings)
