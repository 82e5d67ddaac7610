"""AnyFlow's losses of a flow map (arXiv 2605.13724, its released code): weights by time, rebalancing, fused guidance.

All times are rectified flow's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: y(q) of each weight by time; ``gaussian`` then loses its smallest value.
TIME_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": torch.ones_like,
    "beta08": lambda q: q * (1 - q).sqrt(),
    "gaussian": lambda q: torch.exp(-2 * (q - 0.5) ** 2),
}


class TimeWeight(NamedTuple):
    """A weight that is read off a table of times.

    Attributes:
        times: (K + 1,), float64, descending from 1 to 0.
        weights: (K + 1,), float64; they sum to K, so that the mean is about 1.
    """

    times: Tensor
    weights: Tensor

    def at(self, flow_time: Tensor) -> Tensor:
        """The weights (B,) of the entries nearest to ``flow_time`` (B,)."""
        times, weights = (table.to(flow_time.device, non_blocking=True) for table in self)
        return weights[(flow_time[:, None] - times).abs().argmin(1)]


def time_weight(kind: str, times: Tensor) -> TimeWeight:
    """The table of a weight of :data:`TIME_WEIGHTS` on some times.

    ===========  ======================================================
    kind         weight of q, before it is scaled to the sum K
    ===========  ======================================================
    uniform      1, which stays 1
    beta08       q sqrt(1 - q)
    gaussian     exp(-2 (q - 1/2)^2), less its smallest value
    ===========  ======================================================

    Shapes: ``times``: (N,) with N = K + 1, float64, descending from 1 to 0; of the same shape are the two of the table.

    Raises:
        ValueError: another ``kind``.
    """
    if kind not in TIME_WEIGHTS:
        raise ValueError(f"a weight by time is one of {', '.join(TIME_WEIGHTS)}, not {kind!r}")
    y = TIME_WEIGHTS[kind](times)
    if kind == "uniform":
        return TimeWeight(times, y)
    if kind == "gaussian":
        y = y - y.min()
    return TimeWeight(times, (len(times) - 1) * y / y.sum())


def rebalanced(each: Tensor, apart: Tensor, level: Tensor, eps: float | Tensor) -> Tensor:
    """The losses (B,), where the times are apart multiplied by level / (own loss + eps), held fixed.

    Each of those so has the value ``level`` of the others, and the gradient of ``level`` times its logarithm.

    Args:
        each: losses (B,).
        apart: bool (B,), whether a sample's two times differ.
        level: () mean loss of the samples whose times do not, over all processes.
        eps: keeps the factor finite.
    """
    factor = level.detach() / (each.detach() + eps)
    return torch.where(apart, each * factor, each)


def fused_guidance(u: Tensor, u_null: Tensor, guidance_scale: float) -> Tensor:
    """(u + (w - 1) sg(u_null)) / w (B, ...): what a student that is to come out guided by w is compared with data in.

    Solved for u at the velocity v of data it is w v - (w - 1) u_null, the guided one.
    """
    return (u + (guidance_scale - 1) * u_null.detach()) / guidance_scale
