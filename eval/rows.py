"""One row of a report: measured once, kept on disk, found again by a hash of everything it depends on."""

import dataclasses
import hashlib
import json
import logging
import zipfile
import zlib
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from fewstep.data.durable import write_durably, write_text_durably
from fewstep.eval import speed
from fewstep.eval.config import EvalConfig
from fewstep.eval.features import Features
from fewstep.eval.generate import SampleConditions, generate, run_pipeline
from fewstep.eval.judge import Judge, image_metrics
from fewstep.eval.models import Model, in_steps
from fewstep.reading import read_json
from fewstep.recording.pipeline import without_safety_checker
from fewstep.version import __version__

logger = logging.getLogger(__name__)

# Rows measured by an older way of measuring are not reused.
ROW_VERSION = 1


def measure(
    pipeline: Any, model: Model, conditions: SampleConditions, steps: int, config: EvalConfig, judge: Judge | None
) -> tuple[dict[str, Any], Tensor]:
    """One row: its numbers, and the first `config.columns` samples uint8 (columns, [frames,] C, H, W)."""
    call = {**model.call, "num_inference_steps": steps}
    device = torch.device(pipeline.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # Without a judge the samples are for the grid and the clock alone.
    num = config.num if judge else min(config.num, max(config.columns, 2 * config.batch_size))
    shown: list[Tensor] = []
    features: list[Features] = []
    evaluations: list[float] = []
    seconds: list[tuple[int, float]] = []
    title = f"{model.name}, {in_steps(steps)}"
    made = generate(
        pipeline, call, conditions, range(num), seed=config.seed, batch_size=config.batch_size, description=title
    )
    with without_safety_checker(pipeline):  # what it blackens says nothing of the model
        for samples in made:
            if sum(map(len, shown)) < config.columns:
                shown.append(samples.images)
            if judge and judge.extractor.accepts(tuple(samples.images.shape[1:])):
                features.append(judge.extractor(samples.images))
            evaluations.append(samples.evaluations * len(samples.indices))
            seconds.append((len(samples.indices), samples.seconds))
    numbers, skipped = image_metrics(config.metrics, features, conditions, judge)
    row: dict[str, Any] = {
        "model": model.name,
        "role": model.role,
        "steps": steps,
        "nfe": sum(evaluations) / num,
        "metrics": numbers,
        "floor": judge.reference.floor if judge and "fd_test" in numbers else None,
        "call": call,
        "speed": None,
        "skipped": skipped,
    }
    if "speed" in config.metrics:
        timing = speed.latency(
            lambda: run_pipeline(pipeline, call, conditions, [0], seed=config.seed),
            device=device,
            calls=config.latency_calls,
            budget=config.latency_budget,
        )
        numbers |= {"latency_ms": timing.median * 1e3, "latency_p90_ms": timing.p90 * 1e3}
        size = min(config.batch_size, num)
        if num < 2 * size:
            # The only full batch was the warm-up.
            seconds.append((size, run_pipeline(pipeline, call, conditions, range(size), seed=config.seed).seconds))
        numbers["images_per_second"] = speed.throughput(seconds, size)
        row["speed"] = {**speed.conditions(pipeline), "calls": timing.calls, "batch_size": size}
        if device.type == "cuda":
            row["speed"]["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return row, torch.cat(shown)[: config.columns]


def row_key(
    model: Model, conditions: SampleConditions, steps: int, config: EvalConfig, judge: Judge | None
) -> str | None:
    """A hash of all that a row depends on, or None for a model that nothing identifies."""
    identity = model.fingerprint()
    if identity is None:
        return None
    content = {
        "version": [ROW_VERSION, __version__, torch.__version__, diffusers.__version__],
        "model": [identity, model.role, model.call, steps],
        "conditions": dataclasses.asdict(conditions),
        "samples": [config.num, config.seed, config.batch_size, config.columns],
        "metrics": [sorted(config.metrics), config.latency_calls, config.latency_budget],
        "judge": judge and [judge.extractor.sha256, judge.extractor.resize, judge.reference.name],
        "machine": [speed.device_name(config.torch_device), config.dtype, torch.get_num_threads()],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:20]


def read_row(out: Path, key: str | None) -> tuple[dict[str, Any], Tensor] | None:
    """The row kept under `key` and its pictures, or None; damaged files count as none."""
    path = out / "rows" / f"{key}.json"
    if key is None or not path.is_file():
        return None
    try:
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as stored:
            images = torch.from_numpy(stored["images"])
        return dict(read_json(path)), images
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        logger.warning("%s is damaged: the row is measured again", path)
        return None


def write_row(out: Path, key: str | None, row: dict[str, Any], images: Tensor) -> None:
    """Keep a finished row; without a key (a model that nothing identifies) nothing is kept."""
    if key is None:
        return
    path = out / "rows" / f"{key}.json"

    def save(unfinished: Path) -> None:
        with unfinished.open("wb") as file:  # numpy would add a suffix to a name
            np.savez_compressed(file, images=images.numpy())

    # The JSON comes last: where it stands, the row is complete.
    write_durably(path.with_suffix(".npz"), save)
    write_text_durably(path, json.dumps(row, indent=2, default=str) + "\n")
