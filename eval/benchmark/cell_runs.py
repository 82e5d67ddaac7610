"""One cell run: its training, which goes on where it was stopped, and the evaluation of its student."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.durable import write_text_durably
from fewstep.data.image_opening import opened
from fewstep.errors import UserError
from fewstep.eval.benchmark.cell_results import Result
from fewstep.eval.benchmark.cells import Cell, Training, digest
from fewstep.eval.config import EvalConfig
from fewstep.eval.evaluate import evaluate
from fewstep.eval.known_rows import OF_HOLES
from fewstep.eval.models import Model, student_model, teacher_model
from fewstep.export.folder import written
from fewstep.fashion import PROMPTS, looking
from fewstep.programs import distillation
from fewstep.programs.planning.counting import count_calls
from fewstep.programs.planning.dry_run import DryRun
from fewstep.programs.planning.plan import Planner
from fewstep.programs.planning.weightless import fake_world
from fewstep.recording import record
from fewstep.teachers.loading import load_teacher
from fewstep.version import __version__

logger = logging.getLogger(__name__)

METRICS = ("fd_test", "agreement", "prdc")
#: Of their numbers, those that are written down.
NUMBERS = ("fd_test", "agreement", "recall")
#: Samples in a cell's strip: one of each class.
COLUMNS = len(PROMPTS)


class Runner:
    """Runs cells.

    Args:
        work: folder of the trainings.
    """

    def __init__(self, work: Path) -> None:
        self.work = work

    def run(self, cell: Cell) -> tuple[Result, Tensor]:
        """Train where that is not done yet, then evaluate. Returns the numbers and the first samples.

        Raises:
            UserError: the recipe cannot be run, or its student not at this step count.
        """
        content = cell.content()
        trained: dict[str, float] = {}
        calls: dict[str, dict[str, float]] = {}
        if cell.training is None:
            model = teacher_model(cell.teacher)
        else:
            student, trained["training"] = train(cell.training, cell.seed, self.work)
            calls = network_calls(cell.training, cell.seed)
            model = student_model(student)
        if reason := model.why_not(cell.steps):
            raise UserError(f"{cell.name}: {reason}")
        started = time.process_time()
        more = OF_HOLES if looking(cell.teacher) else ()
        row, images = self._evaluate(model, cell, (*METRICS, *more))
        result = Result(
            cell=cell.name,
            seed=cell.seed,
            num=cell.num,
            nfe=row["nfe"],
            metrics={name: row["metrics"][name] for name in (*NUMBERS, *more)},
            seconds={name: round(s) for name, s in (trained | {"evaluation": time.process_time() - started}).items()},
            calls=calls,
            versions=versions(),
            threads=torch.get_num_threads(),
            content=content,
            hash=digest(content),
        )
        return result, images

    def _evaluate(self, model: Model, cell: Cell, metrics: Sequence[str]) -> tuple[dict[str, Any], Tensor]:
        out = self.work / f"{cell.file}.{digest(cell.content())}.report"
        config = EvalConfig(out, num=cell.num, metrics=metrics, columns=COLUMNS, images="shown", steps=(cell.steps,))
        report = evaluate([model], config, teacher_steps=(cell.steps,))
        (row,) = report.rows
        return row, torch.stack([_pixels(out / picture) for picture in row["pictures"]])


def _pixels(path: Path) -> Tensor:
    """uint8 (C, H, W)."""
    with opened(path) as picture:
        pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0)


def train(training: Training, seed: int, work: Path) -> tuple[Path, float]:
    """The student's folder, and the CPU seconds that its training took in all. A finished training is not run again.

    Args:
        training: of the list.
        seed: of the run.
        work: its folder lies there, under a name that says what the student depends on.
    """
    folder = work / f"{training.title}.seed{seed}.{digest(training.content())}"
    out = folder / "run"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {work} cannot be written: {error.strerror}") from error
    watch = Stopwatch(folder / "seconds.json", out)
    if not watch.finished:
        init = fresh_pipeline(training.teacher, seed, work) if training.scratch else None
        config = training.config(seed, out, (out / "config.yaml").exists(), init)
        logger.info("%s, seed %d: %d training steps", training.title, seed, config.max_steps)
        with watch:
            distillation.run(config, training.method)
    student = next((out / form for form in ("student", "student_lora") if (out / form).is_dir()), None)
    if student is None:
        raise UserError(f"{folder} was finished and has lost its student; remove it, and run make methods")
    return student, watch.seconds


def fresh_pipeline(teacher: str, seed: int, work: Path) -> Path:
    """The folder of an embedded teacher whose denoiser has fresh weights instead of its own."""
    folder = work / f"fresh_{teacher}.seed{seed}"
    if folder.is_dir():
        return folder
    pipeline = load_teacher(teacher)
    networks: dict[str, Any] = dict(record(pipeline).networks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline.register_modules(**{name: type(net).from_config(net.config) for name, net in networks.items()})
    with written(folder) as unfinished:
        pipeline.save_pretrained(unfinished)
    return folder


class Stopwatch:
    """CPU seconds of a work that may be interrupted, or killed, and goes on later.

    With one thread they are those of a quiet machine, also where others share it. Of a process that was killed the wall
    seconds count.

    Args:
        file: where they are kept.
        work: folder whose newest file tells how long a killed process lived.
    """

    def __init__(self, file: Path, work: Path) -> None:
        self.file, self.work = file, work
        about = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.finished: bool = about.get("finished", False)
        self.seconds: float = about.get("seconds", 0.0)
        if about.get("since") is not None:  # nobody has stopped it
            self.seconds += max(0.0, self._newest() - about["since"])

    def __enter__(self) -> Stopwatch:
        self._begun = time.process_time()
        self._write(since=time.time())
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.seconds += time.process_time() - self._begun
        self.finished = kind is None
        self._write(finished=self.finished)

    def _write(self, **about: object) -> None:
        write_text_durably(self.file, json.dumps({"seconds": self.seconds, **about}) + "\n")

    def _newest(self) -> float:
        return max((path.stat().st_mtime for path in self.work.rglob("*") if path.is_file()), default=0.0)


def network_calls(training: Training, seed: int = 0) -> dict[str, dict[str, float]]:
    """What a training costs, its steps counted on stand-ins for the networks: calls in samples.

    Pairs that a run makes of its teacher at the start are calls, too; previews and exports are not counted.
    """
    config = training.config(seed)
    planner = Planner(config, training.method)
    runs = 1 if config.partition_wanted is None else config.partition_wanted.runs
    sums: dict[str, Counter[str]] = {}
    for calls in count_calls(config, training.method, planner.recording, range(config.max_steps)).values():
        for name, one in calls.items():
            sums.setdefault(name, Counter()).update(
                {k: v * config.batch_size * runs for k, v in vars(one).items() if v}
            )
    dry_run = DryRun(config, training.method, planner.recording, world=partial(fake_world, planner.mode))
    if pairs := dry_run.pair_evaluations * (2 if dry_run.guidance_scale != 1.0 else 1):
        sums.setdefault("pairs", Counter())["no_grad"] += pairs
    return {name: dict(calls) for name, calls in sums.items() if calls}


def versions() -> dict[str, str]:
    """Of all that computes, and the instructions that the CPU has for it."""
    known = {"fewstep": __version__, "python": platform.python_version()}
    known["cpu"] = torch.backends.cpu.get_cpu_capability()
    return known | {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "numpy")}
