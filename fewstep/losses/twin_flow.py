"""TwinFlow's losses (arXiv 2512.05150 and its released code): recursive targets of an average velocity, and a distance.

All times are rectified flow's. ``gap`` is t - r, over which the velocity u is the average.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.diffusion.prediction import expand
from fewstep.kernels.error_sums import error_sums
from fewstep.losses.consistency import DISTANCES as PLAIN
from fewstep.losses.consistency import distance as plain_distance

DISTANCES = ("barron", *PLAIN)
WEIGHTINGS = ("gap", "uniform")


def barron(a: Tensor, b: Tensor, alpha: float = 1.0, c: float = 1e-3, eps: float = 1e-8) -> Tensor:
    """m / c * sg((m / (c^2 |alpha - 2| + eps) + 1)^((alpha - 2) / 2)) of each sample, m its mean squared error: (B,).

    The gradient is that of Barron's robust loss (2019) of the root of m, times c. Alpha 2 is m / c; alpha 1 comes close
    to the root of m; lower ones forget what lies far off.

    Args:
        a: (B, ...); gradient flows to both.
        b: (B, ...).
        alpha: how far from a square it is.
        c: errors below this are squared.
        eps: the released code's, 1 % of c^2 there.
    """
    mean = error_sums(a, b) / a[0].numel()
    if alpha == 2:
        return mean / c
    bend = (mean.detach() / (c**2 * abs(alpha - 2) + eps) + 1) ** ((alpha - 2) / 2)
    return mean * bend / c


def distance(kind: str, a: Tensor, b: Tensor, alpha: float = 1.0, c: float = 1e-3, eps: float = 1e-8) -> Tensor:
    """How far apart ``a`` and ``b`` (B, ...) are: ``barron``, or one of the consistency models' distances; (B,).

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "barron":
        return barron(a, b, alpha, c, eps)
    return plain_distance(kind, a, b, c)


def gap_weight(gap: Tensor) -> Tensor:
    """1 + tan((1 - gap) pi / 2.5), (B,): 4.08 where both times agree, 1 over the whole path."""
    return 1 + torch.tan((1 - gap.double()) * (math.pi / 2.5))


def recursive_target(
    u: Tensor,
    velocity: Tensor,
    integral: Tensor,
    gap: Tensor,
    step: Tensor,
    far: Tensor,
    limit: float | None = 1.0,
) -> Tensor:
    """sg(u - clip(R)) (B, ...), R = (gap u - I) / step - v where there is more than a step to go, elsewhere u - v.

    R is 0 where gap u = step v + I: the way to r is one step along v, and what is left from there (RCGM, of any order).

    Args:
        u: the student's average velocity (B, ...).
        velocity: v, along which the first step goes (B, ...).
        integral: I, what the student itself walks from there to r (B, ...).
        gap: (B,).
        step: how far the first step goes (B,).
        far: bool (B,), whether the gap is at least that.
        limit: R is clipped to plus and minus this, None does not.
    """
    with torch.no_grad():
        walked = (expand(gap, u) * u - integral) * expand(1 / step, u)
        residual = torch.where(expand(far, u).bool(), walked, u) - velocity
        return u - (residual if limit is None else residual.clamp(-limit, limit))
