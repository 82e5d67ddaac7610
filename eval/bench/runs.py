"""Runs whose steps are measured: the real loop on a real workbench, without the export before and after.

All are on one teacher, a UNet of 9 M parameters on latents (4, 16, 16) with random weights, eight samples in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from fewstep.config.run import RunConfig
from fewstep.data.fingerprint import teacher_digest
from fewstep.eval.memory.shapes import SHAPES
from fewstep.programs.methods import method_class
from fewstep.programs.pairs import pairs_of_run
from fewstep.programs.teacher import Teacher, TeacherSettings, open_teacher
from fewstep.programs.workbench import Workbench
from fewstep.training.distributed import Processes
from fewstep.training.loop import Loop
from fewstep.training.monitor import Monitor

PROMPTS = "a cat\na dog\na house by the sea\nan old tree\n"


@dataclass(frozen=True)
class Case:
    """A method, and which of its steps stand for all.

    Attributes:
        name: for people.
        method: its name.
        settings: of the run.
        steps: in this order; the first one of a run is logged, and is none of them.
    """

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    steps: Sequence[int] = (1,)


class _Unseen(Monitor):
    """A log without a progress bar."""

    def advance(self, step: int) -> None:
        pass


class Run:
    """A case, ready to be played.

    Args:
        case: what is run.
        teacher: that it starts from.
        config: of the run.
    """

    def __init__(self, case: Case, teacher: Teacher, config: RunConfig) -> None:
        self.case = case
        device = next(iter(teacher.recording.network.parameters())).device
        bench = Workbench(config, teacher, device)
        accelerator = Accelerator(cpu=config.cpu)
        # Adapters change the weights that a teacher is known by.
        wanted = config.pairs_wanted
        identity = teacher_digest(bench.recording) if wanted is not None else {}
        self.method = method_class(case.method).prepare(config, bench)
        pairs = None
        if wanted is not None:
            pairs = pairs_of_run(wanted, bench, self.method.roles["teacher"], identity, accelerator, lambda: None)
        self.batches = bench.batches(pairs)
        self.loop = Loop(
            self.method,
            case.method,
            config,
            batches=self.batches,
            processes=Processes(0, 1),
            monitor=_Unseen(Path(config.out), config.max_steps, accelerator),
            on_samples=lambda step, pause: {},
        )

    def play(self, step: int) -> None:
        """One of the case's steps."""
        self.loop.step = step
        self.loop.one_step()


def open_shape(shape: str, folder: Path, device: torch.device) -> Teacher:
    """The teacher of one shape, recorded and proven.

    Args:
        shape: of :data:`fewstep.eval.memory.shapes.SHAPES`.
        folder: for files of runs.
        device: of its networks.
    """
    torch.manual_seed(0)
    pipeline = SHAPES[shape].build(nullcontext)
    pipeline.set_progress_bar_config(disable=True)
    config = config_of(Case("", "dmd2"), folder, shape, cpu=device.type == "cpu")
    return open_teacher(TeacherSettings.of(config), device, pipeline)


def config_of(case: Case, folder: Path, shape: str, *, cpu: bool) -> RunConfig:
    """The settings of a case's run; its prompts are written into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text(PROMPTS)
    given = {
        "teacher": shape,
        "out": str(folder),
        "prompts": str(prompts),
        "call": SHAPES[shape].call,
        "batch_size": SHAPES[shape].batch_size,
        "max_steps": 1000,
        "log_steps": 1001,
        "report_to": "none",
        "cpu": cpu,
        **case.settings,
    }
    return method_class(case.method).Config(**given)
