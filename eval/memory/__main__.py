"""Memory, measured: one process for each side, what the imports alone take subtracted.

    python -m fewstep.eval.memory roles            LoRA roles against full copies, on a UNet of 135 M parameters
    python -m fewstep.eval.memory plans            what `fewstep plan` says against what is measured, on four shapes
    python -m fewstep.eval.memory quantized [NAME] LoRA roles on a quantised network against a bfloat16 one
    python -m fewstep.eval.memory sharding         a process of a sharded run of two against one of a data-parallel run
    python -m fewstep.eval.memory sdxl             a LoRA run of DMD2 on an SDXL-shaped UNet at 1024 px (needs a GPU)

Measured is the most that a process held: on a GPU torch's peak of allocated memory, on a CPU (Linux only) the peak of
resident memory. Recording, roles, two training steps with their updates; no export, no checkpoint, no sample grid.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fewstep.config.run import RunConfig
from fewstep.config.values import bytes_in_words
from fewstep.errors import UserError
from fewstep.eval.memory.shapes import SHAPES
from fewstep.eval.memory.sharding import compare_sharding
from fewstep.programs.methods import method_class
from fewstep.programs.planning.counting import costliest_step
from fewstep.programs.planning.dry_run import DryRun, backward, move_averages
from fewstep.programs.planning.memory import tensor_bytes
from fewstep.programs.planning.plan import Planner
from fewstep.programs.teacher import TeacherSettings
from fewstep.recording import record
from fewstep.recording.pipeline import is_quantized
from fewstep.training.method import Turn
from fewstep.training.optimization import RoleOptimizer

COMPARED = ("unet", "sd3", "dit", "wan")
#: Full copies and LoRA roles, as they are compared.
SIDES: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora_rank": 16}}
#: LoRA roles on a bfloat16 network.
BF16: dict[str, Any] = {"lora_rank": 16, "mixed_precision": "bf16"}
#: The shapes on which a quantised network is compared: convolutions stay what they are, linear layers do not.
QUANTIZED = ("unet", "sd3")
#: What an SDXL-shaped run is measured at.
SDXL: dict[str, Any] = {"lora_rank": 64, "mixed_precision": "bf16", "gradient_checkpointing": True}


def measure(shape: str, folder: str | None = None, **settings: Any) -> int:
    """The bytes that a run of DMD2 on a shape takes at most, measured in a process of its own.

    Args:
        shape: of :data:`fewstep.eval.memory.shapes.SHAPES`.
        folder: where its pipeline lies, to be loaded as a run loads it; by default it is built.
        **settings: of the run.

    Raises:
        UserError: neither a GPU nor Linux, or the process failed.
    """
    if not torch.cuda.is_available() and not sys.platform.startswith("linux"):
        raise UserError("memory is measured on a GPU, or on the CPU of a Linux system")
    # Every larger block is then mapped by itself and given back when it is freed, as far as malloc is concerned.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
    words = [sys.executable, "-W", "ignore", "-m", "fewstep.eval.memory", "child", shape, json.dumps(settings)]
    words += [] if folder is None else [folder]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with code {done.returncode}, for want of memory?"]
        raise UserError(f"the measured process on {shape} failed: {last[0]}")
    return int(done.stdout.strip().splitlines()[-1])


def estimate(shape: str, **settings: Any) -> int:
    """What `fewstep plan` says of the same run, in bytes."""
    return Planner(_config(shape, settings), "dmd2", SHAPES[shape].build).plan().peak


def run(shape: str, settings: dict[str, Any], folder: str | None = None) -> int:
    """Two steps of the run in this process. Returns the peak of its memory, less what it held at the beginning."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = _peak(device)
    config = _config(shape, settings)
    if folder is None:
        pipeline = SHAPES[shape].build(partial(torch.device, device))
    else:
        pipeline = TeacherSettings.of(replace(config, teacher=folder)).load()
    pipeline.to(device)  # buffers that are made of numbers
    pipeline.set_progress_bar_config(disable=True)
    dry_run = DryRun(config, "dmd2", record(pipeline, **(config.call or {})), device)
    method = dry_run.prepare()
    optimizers = {
        name: RoleOptimizer(role, config, config.lr) for name, role in method.roles.items() if role.parameters()
    }
    step = costliest_step(config, "dmd2", dry_run.recording)
    for again in range(2):  # the optimizer's state is there in the second step
        for turn in method.turns(step, dry_run.batch(step)):
            if isinstance(turn, Turn):
                backward(method, turn)
                optimizers[turn.role].update(again)
                move_averages(method, turn, config.ema_decay)
    return _peak(device) - before


def compare_roles() -> float:
    """LoRA roles against full copies on the UNet; the ratio of what they take."""
    taken = {side: measure("unet", **settings) for side, settings in SIDES.items()}
    ratio = taken["lora"] / taken["full"]
    print(f"full copies {bytes_in_words(taken['full'])}, LoRA roles {bytes_in_words(taken['lora'])}: {ratio:.2f}x")
    return ratio


def compare_plans(shapes: Sequence[str] = COMPARED) -> dict[tuple[str, str], float]:
    """Estimate over measured for each shape and side, as a table in Markdown."""
    ratios: dict[tuple[str, str], float] = {}
    print("| shape | roles | planned | measured | planned / measured |\n| --- | --- | ---: | ---: | ---: |")
    for shape in shapes:
        for side, settings in SIDES.items():
            planned, measured = estimate(shape, **settings), measure(shape, **settings)
            ratios[shape, side] = planned / measured
            row = (shape, side, bytes_in_words(planned), bytes_in_words(measured), f"{ratios[shape, side]:.2f}")
            print(f"| {' | '.join(row)} |", flush=True)
    return ratios


def compare_quantized(name: str = "torchao_int8") -> None:
    """LoRA roles on a network that is quantised as `name` says against a bfloat16 one, as a table in Markdown."""
    print("| shape | network | its weights | the run |\n| --- | --- | ---: | ---: |")
    for shape in QUANTIZED:
        with tempfile.TemporaryDirectory() as folder:
            SHAPES[shape].build(nullcontext).to(torch.bfloat16).save_pretrained(folder)
            for settings in (BF16, {**BF16, "quantization": name}):
                loaded = TeacherSettings.of(replace(_config(shape, settings), teacher=folder)).load()
                component = record(loaded, **SHAPES[shape].call).component
                network = getattr(loaded, component)
                held = tensor_bytes(network if is_quantized(network) else network.to(torch.bfloat16))
                del loaded, network
                row = (shape, settings.get("quantization", "bfloat16"), bytes_in_words(held))
                print(f"| {' | '.join(row)} | {bytes_in_words(measure(shape, folder, **settings))} |", flush=True)


def main(words: Sequence[str]) -> int:
    """The command line of this file. Returns the exit code."""
    try:
        if words[:1] == ["child"]:
            print(run(words[1], json.loads(words[2]), *words[3:]))
        elif list(words) == ["roles"]:
            compare_roles()
        elif words[:1] == ["plans"]:
            compare_plans(words[1:] or COMPARED)
        elif words[:1] == ["quantized"]:
            compare_quantized(*words[1:])
        elif list(words) == ["sharding"]:
            compare_sharding()
        elif list(words) == ["sdxl"]:
            if not torch.cuda.is_available():
                raise UserError("an SDXL-shaped run is measured on a GPU, and there is none")
            name, planned = torch.cuda.get_device_name(), estimate("sdxl", **SDXL)
            print(f"{name}: {bytes_in_words(measure('sdxl', **SDXL))}, planned {bytes_in_words(planned)}")
        else:
            raise UserError(
                "python -m fewstep.eval.memory roles | plans [SHAPE ...] | quantized [NAME] | sharding | sdxl"
            )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _config(shape: str, settings: dict[str, Any]) -> RunConfig:
    if shape not in SHAPES:
        raise UserError(f"there is no shape {shape!r}; there are: {', '.join(SHAPES)}")
    about = {"batch_size": SHAPES[shape].batch_size, "call": SHAPES[shape].call, **settings}
    return method_class("dmd2").Config(teacher=shape, out="", **about)


def _peak(device: torch.device) -> int:
    """The most that this process has held so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None  # every Linux process has it, and others were refused
    return int(found[1]) * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
