"""MeanFlow (Geng et al. 2025, arXiv 2505.13447) and its relatives: targets of an average velocity, and their weights.

u(x_t, r, t) is the average velocity between r and t. Differentiating (t - r) u = integral of v gives the MeanFlow
identity u = v - (t - r) du/dt (Eq. 6), whose right side, held fixed, is the target. All times are rectified flow's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.kernels.error_sums import error_sums
from fewstep.kernels.mean_flow_target import mean_flow_target as fused_target

WEIGHTINGS = ("uniform", "sum", "sum_squared", "mean", "norm")


def mean_flow_target(velocity: Tensor, derivative: Tensor, gap: Tensor, share: float = 1.0) -> Tensor:
    """v - share * clip(t - r) * du/dt (B, ...) (Eq. 11); ``gap``: t - r (B,).

    ``share`` is that of the derivative while it is warmed up.
    """
    return fused_target(velocity, derivative, share * gap.clamp(0, 1))


def alpha_flow_target(velocity: Tensor, later: Tensor, share: float, limit: float | None = None) -> Tensor:
    """share * v + (1 - share) * u(x_s, r, s) (B, ...), s = t - share * (t - r): alpha-Flow (arXiv 2510.20771).

    Args:
        velocity: v at t (B, ...).
        later: the student's own average velocity between r and s (B, ...), without gradient.
        share: alpha in (0, 1]; 1 is trajectory flow matching, towards 0 it becomes MeanFlow.
        limit: the target is clipped to plus and minus this.
    """
    target = torch.lerp(later, velocity, share)
    return target if limit is None else target.clamp(-limit, limit)


def alpha_at(step: int, first: int, last: int) -> float:
    """alpha-Flow's share: 1 - sigmoid(25 (k - middle) / (last - first)), 1 and 0 where that is within 0.005 of them."""
    z = 25 * (step - (first + last) / 2) / max(last - first, 1)
    alpha = float(torch.sigmoid(torch.tensor(-z, dtype=torch.float64)))
    return 0.0 if alpha < 0.005 else 1.0 if alpha > 0.995 else alpha


def weighted_loss(
    u: Tensor, target: Tensor, weighting: str, power: float, constant: float, scale: float = 1.0
) -> Tensor:
    """The loss of each sample (B,), its weight held fixed.

    With S the sum and m the mean of a sample's squared error:

    ===========  ==================================  =========================================
    weighting    loss                                source
    ===========  ==================================  =========================================
    uniform      S
    sum          S / (S + c)^p                       MeanFlow, §4.2
    sum_squared  S^2 / (S^2 + c)^p, S^2's            ports of MeanFlow to PyTorch
                 denominator and factor S fixed
    mean         m / (m + c)^p                       another port; alpha-Flow
    norm         |u - sg(u + w T)|^2, T = scale *    FastGen; with p = 1 sCM's normalised
                 (target - u), w = (|T| + c)^-p      tangent (Lu & Song 2024, §4)
    ===========  ==================================  =========================================

    Args:
        u: the student's average velocity (B, ...); gradient flows to it alone.
        target: (B, ...).
        weighting: see above.
        power: p.
        constant: c.
        scale: of T, for ``norm``.

    Raises:
        ValueError: another ``weighting``.
    """
    total = error_sums(u, target.detach())
    fixed, entries = total.detach(), u[0].numel()
    if weighting == "uniform":
        return total
    if weighting == "sum":
        return total / (fixed + constant) ** power
    if weighting == "sum_squared":
        return total.square() / (fixed.square() + constant) ** power
    if weighting == "mean":
        return total / entries / (fixed / entries + constant) ** power
    if weighting == "norm":
        # With S the sum of squares: |T| is scale sqrt(S), the value (w |T|)^2, and its gradient w scale that of S.
        weight = scale * (abs(scale) * fixed.sqrt() + constant) ** -power
        return weight.square() * fixed + weight * (total - fixed)
    raise ValueError(f"weighting is one of {', '.join(WEIGHTINGS)}, not {weighting!r}")
