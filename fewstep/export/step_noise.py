"""The noise between the steps of a fresh-noise student, drawn from the generators of its pipeline's call.

Flux, SD3, Wan, DiT and many others call ``scheduler.step`` without a generator, and fresh noise then comes from torch's
global one, which the whole batch shares: no seed that is given to the pipeline makes an image reproducible.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fewstep.recording.pipeline import find_scheduler
from fewstep.recording.watch.hooks import method_replaced


@contextlib.contextmanager
def step_noise_from(pipeline: Any, generator: torch.Generator | Sequence[torch.Generator] | None) -> Iterator[None]:
    """While active, ``scheduler.step`` draws from ``generator`` where the pipeline passes none.

    Schedulers whose step takes no generator are left alone.

    Args:
        pipeline: its present scheduler is meant.
        generator: one for the whole batch, or one for each sample, which makes a sample independent of its
            neighbours; None: nothing is changed.
    """
    scheduler = getattr(pipeline, find_scheduler(pipeline))
    inner = scheduler.step
    signature = inspect.signature(inner)
    if generator is None or "generator" not in signature.parameters:
        yield
        return

    def step(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        if bound.arguments.get("generator") is None:
            rows = getattr(pipeline, "rows_in_call", None)  # where one of several students makes some of the samples
            own = generator
            if rows is not None and not isinstance(generator, torch.Generator):
                own = [generator[row] for row in rows]
            bound.arguments["generator"] = _of_rows(own, len(bound.arguments["sample"]))
        return inner(*bound.args, **bound.kwargs)

    with step_replaced(scheduler, step):
        yield


@contextlib.contextmanager
def step_replaced(scheduler: Any, step: Callable[..., Any]) -> Iterator[None]:
    """While active, ``step`` stands in for ``scheduler.step``."""
    # wraps() keeps the signature visible: pipelines inspect it to decide which arguments they pass.
    with method_replaced(scheduler, "step", functools.wraps(scheduler.step)(step)):
        yield


def _of_rows(
    generator: torch.Generator | Sequence[torch.Generator], rows: int
) -> torch.Generator | list[torch.Generator]:
    if isinstance(generator, torch.Generator):
        return generator
    # DiT steps its guidance-doubled batch: row k belongs to sample k modulo the batch size.
    return [generator[row % len(generator)] for row in range(rows)]
