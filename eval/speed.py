"""How fast: latency of one call, throughput of a batch, and the conditions both were measured under."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Latency:
    """Seconds of one call: median and 90th percentile over `calls` calls."""

    median: float
    p90: float
    calls: int


def latency(
    call: Callable[[], object], *, device: torch.device, calls: int = 20, warmup: int = 2, budget: float = 60.0
) -> Latency:
    """Time `call` after `warmup` untimed calls; the device is waited for before each reading of the clock.

    budget: seconds after which no further call starts (slow teachers), but at least one is timed; the count is
    part of the result. Raises ValueError for calls < 1.
    """
    if calls < 1:
        raise ValueError("latency needs at least one call")
    started = time.perf_counter()
    for _ in range(warmup):
        call()
        if time.perf_counter() - started > budget:
            break
    seconds: list[float] = []
    while len(seconds) < calls and (not seconds or time.perf_counter() - started < budget):
        _wait_for(device)
        before = time.perf_counter()
        call()
        _wait_for(device)
        seconds.append(time.perf_counter() - before)
    ordered = sorted(seconds)
    # Nearest rank: the smallest measured value that at least 90 % of the calls do not exceed.
    p90 = ordered[-(-len(ordered) * 9 // 10) - 1]
    return Latency(statistics.median(ordered), p90, len(ordered))


def throughput(batch_seconds: Sequence[tuple[int, float]], batch_size: int) -> float:
    """Samples per second at `batch_size`, from (size, seconds) of the batches of a run, by their median.

    The first full batch is the warm-up, smaller ones are left out. Raises ValueError when nothing else is there.
    """
    full = [seconds for size, seconds in batch_seconds if size == batch_size]
    if len(full) < 2:
        raise ValueError(f"a throughput needs two batches of {batch_size}")
    return batch_size / statistics.median(full[1:])


def device_name(device: torch.device) -> str:
    """The model of a GPU, or the kind of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


def conditions(pipeline: Any) -> dict[str, Any]:
    """What a timing depends on beside the model: device, dtype, threads, torch."""
    return {
        "device": device_name(torch.device(pipeline.device)),
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
