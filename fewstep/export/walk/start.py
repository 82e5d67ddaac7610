"""Where a pipeline's walk starts: which number times the noise that it drew is its first sample."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.export.walk.trace import Trace

# The largest trace of a picture in a first sample, relative to its noise.
_TRACE = 0.01
# The largest root mean square of a clean sample. What is no such one is some twenty at the top of a table.
_CLEAN = 5.0


@dataclass(frozen=True)
class Start:
    """The first x_t is ``scale`` times unit noise; ``traced``: and a trace of a picture."""

    scale: float
    traced: bool = False


def start_of(
    seen: Trace,
    scheduler: Any,
    x_t: Tensor,
    close: float,
    pictured: bool,
    kept: Tensor | None = None,
    level: tuple[float, float] = (0.0, 1.0),
) -> Start | None:
    """What unit noise was multiplied with to give the first x_t, found by looking the drawn numbers up in it.

    Args:
        seen: the run.
        scheduler: of the pipeline.
        x_t: the first one, float64 on the CPU.
        close: how near numbers of size one are in the sample's dtype.
        pictured: whether it may hold a trace of a picture: a thousandth (HunyuanVideo's image to video), or what the
            schedule leaves of a clean sample at the first time (a table's last alpha is 0.07: Depth2Img).
        kept: the entries that are a picture's and no noise, bool of the shape of x_t; None: none are.
        level: alpha and sigma of the first time.

    Returns:
        None where the first x_t is nothing of the kind.
    """
    noisy = torch.ones_like(x_t, dtype=torch.bool) if kept is None else ~kept
    x = x_t[noisy].sort().values
    # The scheduler's own word for it, in x_t: exact where the measured number is rounded.
    sample = seen.steps[0].sample.double().cpu()[noisy].sort().values
    stated = float(getattr(scheduler, "init_noise_sigma", 1.0)) * float(x.norm() / sample.norm())
    for draw in seen.initial_draws:
        drawn = draw.value.double().cpu()
        noise = drawn.flatten().sort().values
        if len(noise) > len(x) and _holds(noise, x / stated, 10 * close):
            return Start(stated)  # a part of the noise: of the rest a picture takes the place
        if len(noise) == len(x):
            # Packing reorders the noise, so sorted values are compared.
            scale = float(x.norm() / noise.norm())
            if bool((x - scale * noise).abs().max() <= 10 * close * scale):
                return Start(stated if math.isclose(scale, stated, rel_tol=close) else scale)
        if not pictured or kept is not None:
            continue
        alpha, sigma = level
        for part in _parts(drawn, x_t):
            if alpha > 0 and float((x_t.flatten() - sigma * part).square().mean().sqrt()) <= _CLEAN * alpha:
                return Start(sigma, traced=True)
            share = float(x_t.flatten() @ part / (part @ part))
            near = math.isclose(share, stated, rel_tol=_TRACE)
            if near and bool((x_t.flatten() - share * part).abs().max() <= _TRACE * share):
                return Start(share, traced=True)
    return None


def _parts(drawn: Tensor, x_t: Tensor) -> Iterator[Tensor]:
    """The parts of drawn numbers that may be those of x_t, flat: all of them, or a range along one axis."""
    if drawn.numel() == x_t.numel():
        yield drawn.flatten()
        return
    sizes = list(zip(drawn.shape, x_t.shape, strict=False))
    others = [axis for axis, (there, here) in enumerate(sizes) if there != here]
    if drawn.dim() == x_t.dim() and len(others) == 1:
        (axis,) = others
        for first in range(drawn.shape[axis] - x_t.shape[axis] + 1):
            yield drawn.narrow(axis, first, x_t.shape[axis]).flatten()


def _holds(values: Tensor, some: Tensor, tolerance: float) -> bool:
    """Whether each of some numbers is one of the sorted values, within a tolerance."""
    places = torch.searchsorted(values, some).clamp(1, len(values) - 1)
    nearest = torch.minimum((values[places] - some).abs(), (values[places - 1] - some).abs())
    return bool((nearest <= tolerance).all())
