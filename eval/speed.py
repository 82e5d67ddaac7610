"""How fast: latency and throughput of several models side by side, and the conditions they were measured under.

A machine's speed changes from minute to minute, so numbers that were taken one after the other do not compare. Here
every round times each model once, in turn, and what is compared are the ratios within a round.
"""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one model's calls, and how they compare with the baseline's calls of the same rounds.

    median, p90: over ``rounds`` calls. ratio: median of baseline / own seconds, how many times as fast as the baseline
    it is; low, high: its quartiles. None for the baseline, and where there is none.
    """

    median: float
    p90: float
    rounds: int
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


def side_by_side(
    calls: Sequence[Callable[[], object]],
    *,
    device: torch.device,
    rounds: int = 20,
    budget: float = 60.0,
    baseline: int | None = None,
    warm_up: bool = True,
) -> list[Timing]:
    """Time each of `calls` once a round, after an untimed call of each; the device is waited for around each.

    budget: seconds after which no further round starts (slow teachers), but at least one is timed; the count is part
    of the result. baseline: which of the calls the others are compared with. warm_up: False where every call was made
    before. Raises ValueError for rounds < 1.
    """
    if rounds < 1:
        raise ValueError("a timing needs at least one round")
    started = time.perf_counter()
    for call in calls if warm_up else ():
        call()
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds if calls else 0):
        if number and time.perf_counter() - started > budget:
            break
        for own, call in zip(seconds, calls):
            _wait_for(device)
            before = time.perf_counter()
            call()
            _wait_for(device)
            own.append(time.perf_counter() - before)
    theirs = None if baseline is None else seconds[baseline]
    return [_timing(own, None if own is theirs else theirs) for own in seconds]


def _timing(own: Sequence[float], baseline: Sequence[float] | None) -> Timing:
    ordered = sorted(own)
    # Nearest rank: the smallest measured value that at least 90 % of the calls do not exceed.
    p90 = ordered[-(-len(ordered) * 9 // 10) - 1]
    timing = (statistics.median(ordered), p90, len(ordered))
    if baseline is None:
        return Timing(*timing)
    ratios = [theirs / mine for theirs, mine in zip(baseline, own)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
    return Timing(*timing, middle, low, high)


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
