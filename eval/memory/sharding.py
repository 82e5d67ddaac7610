"""What a process of a sharded run takes, beside one of a data-parallel run: full DMD2 on a UNet of 135 M parameters.

Started by ``python -m fewstep.eval.memory sharding``. Measured on Linux: the most that a process holds in memory during
two training steps, less what it held when everything was imported; the larger of two processes on one machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from fewstep.config.values import bytes_in_words
from fewstep.errors import UserError
from fewstep.eval.memory.shapes import SHAPES
from fewstep.programs.methods import method_class
from fewstep.programs.planning.dry_run import DryRun
from fewstep.programs.sharded_run import free_teacher
from fewstep.recording import record
from fewstep.training.distributed import join_launch
from fewstep.training.held import Holding
from fewstep.training.method import Turn
from fewstep.training.optimization import RoleOptimizer
from fewstep.training.sharding import Sharding, open_mesh

SIDES = ("none", "full")
_PROCESSES = 2
_SHAPE = "unet"


def measure(side: str) -> int:
    """The bytes that a process takes at most, of a run with this ``--sharding``.

    Raises:
        UserError: this is no Linux, or a process failed.
    """
    if not sys.platform.startswith("linux"):
        raise UserError("the memory of sharded runs is measured on Linux")
    # Every larger block is then mapped by itself and given back when it is freed, as far as malloc is concerned.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
    words = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc_per_node", str(_PROCESSES), "-m", "fewstep.eval.memory.sharding", side]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise UserError(f"the measured processes failed: {done.stderr.strip().splitlines()[-1:]}")
    return max(int(line.removeprefix("bytes ")) for line in done.stdout.splitlines() if line.startswith("bytes "))


def run(side: str) -> int:
    """Two steps of one process of the run. Returns the peak of its memory during them, less what it held before."""
    before = _status("VmRSS")
    accelerator = join_launch(cpu=True)
    config = method_class("dmd2").Config(teacher=_SHAPE, out="", batch_size=1, critic_updates=1, sharding=side)
    torch.manual_seed(0)
    pipeline = SHAPES[_SHAPE].build(partial(torch.device, "cpu"))
    pipeline.set_progress_bar_config(disable=True)
    dry_run = DryRun(config, "dmd2", record(pipeline), accelerator.device)
    method = dry_run.prepare()
    holding = Holding()
    if side == "full":
        holding = sharding = Sharding(open_mesh("cpu", accelerator.num_processes))
        batch = dry_run.batch(0)
        x, t = torch.zeros(batch.size, *batch.shape), torch.full((batch.size,), 0.5, dtype=torch.float64)
        sharding.shard(list(method.roles.values()), lambda role: role.denoiser(x, t, batch.conditioning))
        free_teacher(dry_run.recording, method.roles["teacher"], keep=False)
    optimizers = {
        name: RoleOptimizer(role, config, config.lr, held=holding.held(role))
        for name, role in method.roles.items()
        if role.parameters()
    }
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for step in range(2):  # the optimizer's state is there in the second step
        for turn in method.turns(step, dry_run.batch(step)):
            assert isinstance(turn, Turn)
            tensors, gradients = zip(*turn.backward, strict=True)
            torch.autograd.backward(tensors, gradients, inputs=optimizers[turn.role].held.leaves)
            optimizers[turn.role].update(step)
    return _status("VmHWM") - before


def compare_sharding() -> float:
    """A sharded run against a data-parallel one; the ratio of what their processes take."""
    taken = {side: measure(side) for side in SIDES}
    ratio = taken["full"] / taken["none"]
    alone, sharded = bytes_in_words(taken["none"]), bytes_in_words(taken["full"])
    print(f"data parallel {alone}, sharded {sharded} in each of two processes: {ratio:.2f}x")
    return ratio


def _status(name: str) -> int:
    """A number of this process's state, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    print("bytes", run(sys.argv[1]), flush=True)
