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
# The largest alpha at which a picture under the noise is a trace: below a table's top it is most of a sample.
_LEFT = 0.1
# How far the noise's share of a first sample may be from its sigma, relative: a picture has some of it by chance.
_SHARE = 0.5


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
    draws = [draw.value.double().cpu() for draw in seen.initial_draws]
    for drawn in draws:
        noise = drawn.flatten().sort().values
        if len(noise) > len(x) and _holds(noise, x / stated, 10 * close):
            return Start(stated)  # a part of the noise: of the rest a picture takes the place
        if len(noise) == len(x):
            # Packing reorders the noise, so sorted values are compared.
            scale = float(x.norm() / noise.norm())
            if bool((x - scale * noise).abs().max() <= 10 * close * scale):
                return Start(stated if math.isclose(scale, stated, rel_tol=close) else scale)
    if pictured and kept is None:
        return next((start for drawn in draws for start in _traces(x_t, drawn, stated, level)), None)
    return None


def _traces(x_t: Tensor, drawn: Tensor, stated: float, level: tuple[float, float]) -> Iterator[Start]:
    """The start if x_t is drawn numbers with a trace of a picture: other drawn numbers have no share of it."""
    alpha, sigma = level
    for part in _parts(drawn, x_t):
        share = float(x_t.flatten() @ part / (part @ part))
        rest = float((x_t.flatten() - sigma * part).square().mean().sqrt())
        if 0 < alpha <= _LEFT and rest <= _CLEAN * alpha and math.isclose(share, sigma, rel_tol=_SHARE):
            yield Start(sigma, traced=True)
        near = math.isclose(share, stated, rel_tol=_TRACE)
        if near and bool((x_t.flatten() - share * part).abs().max() <= _TRACE * share):
            yield Start(share, traced=True)


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
