"""The speed of all rows of an evaluation, at its end: every model in memory, timed in turn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from fewstep.eval import speed
from fewstep.eval.config import EvalConfig
from fewstep.eval.generate import run_pipeline
from fewstep.eval.sources import ModelSource

logger = logging.getLogger(__name__)

_THROUGHPUT_ROUNDS = 3


def time_rows(
    sources: Sequence[ModelSource], load: Callable[[ModelSource], Any], config: EvalConfig, baseline: int | None
) -> list[dict[str, Any]]:
    """Latency of one sample and throughput of a batch of every row, and how they compare with the baseline's.

    Args:
        sources: of the rows.
        load: gives a row's pipeline; one that several rows share is the same object.
        config: of the evaluation.
        baseline: the row that the others are compared with.

    Returns:
        of each row ``latency_ms``, ``latency_p90_ms``, ``images_per_second``; beside a baseline ``latency_ratio`` with
        its quartiles ``latency_ratio_low`` and ``_high``, how many times as fast as the baseline in the same round,
        and ``throughput_ratio`` likewise; ``rounds``, ``batch_size`` and the conditions; on a GPU
        ``peak_memory_bytes`` of a batch.
    """
    logger.info("timing %d rows side by side", len(sources))
    pipelines = [load(source) for source in sources]
    device = torch.device(pipelines[0].device) if pipelines else config.torch_device
    size = min(config.batch_size, min(source.num for source in sources))
    peaks: list[int | None] = [None] * len(sources)

    def call(number: int, count: int) -> Callable[[], None]:
        source = sources[number]

        def run() -> None:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            run_pipeline(pipelines[number], source.call, source.conditions, range(count), seed=source.seed)
            if device.type == "cuda":
                peaks[number] = torch.cuda.max_memory_allocated(device)

        return run

    rows = range(len(sources))
    rounds, budget = config.latency_calls, config.latency_budget
    timed = partial(speed.side_by_side, device=device, budget=budget, baseline=baseline)
    one = timed([call(number, 1) for number in rows], rounds=rounds)
    many = timed(
        [call(number, size) for number in rows],
        rounds=min(rounds, _THROUGHPUT_ROUNDS),
        warm_up=device.type != "cpu",  # a CPU chooses nothing by the size of a batch
    )
    found = []
    for number, (latency, batch) in enumerate(zip(one, many)):
        row: dict[str, Any] = {
            "latency_ms": latency.median * 1e3,
            "latency_p90_ms": latency.p90 * 1e3,
            "images_per_second": size / batch.median,
        }
        row |= _ratios("latency", latency) | _ratios("throughput", batch)
        row |= {"rounds": latency.rounds, "batch_size": size, **speed.conditions(pipelines[number])}
        if peaks[number] is not None:
            row["peak_memory_bytes"] = peaks[number]
        found.append(row)
    return found


def _ratios(name: str, timing: speed.Timing) -> dict[str, float]:
    known = asdict(timing)
    names = {"ratio": f"{name}_ratio", "low": f"{name}_ratio_low", "high": f"{name}_ratio_high"}
    return {title: known[key] for key, title in names.items() if known[key] is not None}
