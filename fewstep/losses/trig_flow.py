"""Continuous-time consistency (sCM, Lu & Song 2024, arXiv 2410.11081; rCM, arXiv 2510.08431) as functions of tensors.

f(y, angle) = cos y - sin sigma_data F is to be the same at all times of a trajectory, so F is moved along the tangent,
cos df / d angle, in which no number grows beyond bounds. All angles (B,) are float64, all samples are TrigFlow's
(:mod:`fewstep.diffusion.trig_flow`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.diffusion.prediction import expand
from fewstep.kernels.error_sums import error_sums

TANGENTS = ("scm", "rcm")
NORMALIZATIONS = ("none", "norm", "norm/sqrt(dim)", "clip")


def tangent(
    kind: str,
    output: Tensor,
    derivative: Tensor,
    y: Tensor,
    direction: Tensor,
    angle: Tensor,
    share: float = 1.0,
    sigma_data: float = 1.0,
    warm_derivative: bool = False,
) -> Tensor:
    """cos df / d angle (B, ...), with the part that a network is slow to learn warmed up by ``share`` q; no gradient.

    With s sigma_data, v = dy / d angle and J the derivative of F along cos sin (v, 1):

    ====  ======================================================================  ==============================
    kind  tangent
    ====  ======================================================================  ==============================
    scm   -cos^2 (s F - v) - q (cos sin y + s J)                                  sCM, Alg. 1
    rcm   -cos sqrt(1 - q^2 sin^2) (s F - v) - (q cos sin y + s J)                rCM's code, where q spares J
    ====  ======================================================================  ==============================

    At q = 1 they are one.

    Args:
        kind: see above.
        output: F (B, ...).
        derivative: J (B, ...).
        y: TrigFlow's sample (B, ...).
        direction: v (B, ...).
        angle: (B,).
        share: q in [0, 1].
        sigma_data: s.
        warm_derivative: of ``rcm``: q is on J as well.

    Raises:
        ValueError: another ``kind``.
    """
    output, cos, sin = output.detach(), angle.cos(), angle.sin()
    apart, moved = sigma_data * output - direction, expand(cos * sin, y) * y
    if kind == "scm":
        return -expand(cos**2, y) * apart - share * (moved + sigma_data * derivative)
    if kind == "rcm":
        own = share if warm_derivative else 1.0
        first = expand(cos * (1 - share**2 * sin**2).sqrt(), y) * apart
        return -first - (share * moved + own * sigma_data * derivative)
    raise ValueError(f"a tangent is one of {', '.join(TANGENTS)}, not {kind!r}")


def normalized(tangent: Tensor, kind: str, constant: float = 0.1, entries: Tensor | None = None) -> Tensor:
    """The tangent (B, ...) at another length, the norm n over a sample of d entries (sCM, §4.1).

    ``entries``: d (B,) of samples that are padded with zeros; default all.

    ``norm``: divided by n + c, c = ``constant``; ``norm/sqrt(dim)``: by n / sqrt(d) + c, the same for samples of every
    size; ``clip``: each entry clipped to [-1, 1]; ``none``.

    Raises:
        ValueError: another ``kind``.
    """
    if kind == "none":
        return tangent
    if kind == "clip":
        return tangent.clamp(-1, 1)
    if kind not in NORMALIZATIONS:
        raise ValueError(f"a tangent is normalised by one of {', '.join(NORMALIZATIONS)}, not {kind!r}")
    norm = error_sums(tangent).sqrt()
    if kind == "norm/sqrt(dim)":
        norm = norm / (tangent[0].numel() if entries is None else entries.to(norm)) ** 0.5
    return tangent * expand(1 / (norm + constant), tangent)


def tangent_loss(output: Tensor, tangent: Tensor) -> Tensor:
    """The mean of |F - sg(F) - g|^2 over each sample (B,): its value is that of g, its gradient moves F along g.

    Source: sCM, Eq. 8.
    """
    return error_sums(output, output.detach() + tangent) / output[0].numel()


def by_log_variance(loss: Tensor, log_variance: Tensor) -> Tensor:
    """exp(-w) loss + w (B,): at its minimum w is the loss's logarithm, so that all times weigh alike (sCM, App. D)."""
    return torch.exp(-log_variance) * loss + log_variance
