"""What a network's output means: conversions between the raw output, x0 and noise, and the steps built on them.

All conversions are affine in the raw output, ``x0 = skip * x_t + out * raw``, with (skip, out) computed in float64 from
(alpha, sigma) and cast once to the sample's dtype. For ``x_t = alpha * x0 + sigma * noise`` the kinds are

=============  =============================  ======================================================
kind           raw                            x0
=============  =============================  ======================================================
epsilon        noise                          (x_t - sigma * raw) / alpha
v_prediction   alpha * noise - sigma * x0     (alpha * x_t - sigma * raw) / (alpha^2 + sigma^2)
sample         x0                             raw
flow           noise - x0                     (x_t - sigma * raw) / (alpha + sigma)
edm            the preconditioned F           c_skip * x_t + c_out * raw (Karras et al. 2022, Eq. 7)
edm_v          -F, diffusers' v of an EDM     c_skip * x_t - c_out * raw
=============  =============================  ======================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.diffusion.schedule import Coefficients, EDMSchedule, NoiseSchedule
from fewstep.kernels.guided_x0 import guided_x0
from fewstep.kernels.renoise import renoise
from fewstep.kernels.rows import expand as expand

KINDS = ("epsilon", "v_prediction", "sample", "flow", "edm", "edm_v")


def x0_map(kind: str, schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(skip, out), each float64 (B,), of ``x0 = skip * x_t + out * raw`` at ``t`` (B,).

    Raises:
        ValueError: unknown ``kind``, or one of EDM under a schedule without a sigma_data.
    """
    alpha, sigma = schedule.coefficients(t)
    if kind == "epsilon":
        return 1 / alpha, -sigma / alpha
    if kind == "v_prediction":
        norm = alpha**2 + sigma**2
        return alpha / norm, -sigma / norm
    if kind == "sample":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if kind == "flow":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    if kind in ("edm", "edm_v") and isinstance(schedule, EDMSchedule):
        variance = sigma**2 + schedule.sigma_data**2
        out = sigma * schedule.sigma_data / variance.sqrt()
        return schedule.sigma_data**2 / variance, out if kind == "edm" else -out
    raise ValueError(f"unknown prediction type {kind!r} under {type(schedule).__name__}; known: {', '.join(KINDS)}")


def to_x0(
    raw: Tensor,
    kind: str,
    x_t: Tensor,
    schedule: NoiseSchedule,
    t: Tensor,
    negative: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
) -> Tensor:
    """x0 (B, ...) from the raw output, in the dtype of ``x_t``. ``raw``, ``x_t``: (B, ...); ``t``: (B,).

    With a ``negative`` raw output (B, ...), of negative + w (raw - negative); w: a number, or of each sample (B,).
    """
    if kind == "sample" and negative is None:
        return raw.to(x_t.dtype)
    return guided_x0(x_t, *x0_map(kind, schedule, t), raw, negative, guidance_scale)


def velocity_map(kind: str, schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(skip, out), each float64 (B,), of ``velocity = skip * x_t + out * raw`` at ``t`` (B,), which is above 0.

    The velocity is noise - x0, that of x_t / (alpha + sigma) in rectified flow's time sigma / (alpha + sigma): see
    :meth:`fewstep.diffusion.schedule.NoiseSchedule.flow_time`. Of a flow network it is the raw output, exactly.
    """
    alpha, sigma = schedule.coefficients(t)
    skip, out = x0_map(kind, schedule, t)
    flow_time = sigma / (alpha + sigma)
    return (1 / (alpha + sigma) - skip) / flow_time, -out / flow_time


def to_velocity(raw: Tensor, kind: str, x_t: Tensor, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """The velocity noise - x0 (B, ...) from the raw output, see :func:`velocity_map`; as :func:`to_x0` otherwise."""
    return guided_x0(x_t, *velocity_map(kind, schedule, t), raw)


def from_x0(x0: Tensor, kind: str, x_t: Tensor, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """The raw output of ``kind`` (B, ...) that stands for ``x0`` at ``x_t``: the inverse of :func:`to_x0`."""
    skip, out = x0_map(kind, schedule, t)
    return (x0.to(x_t.dtype) - expand(skip, x_t) * x_t) * expand(1 / out, x_t)


def convert(raw: Tensor, source: str, target: str, x_t: Tensor, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """A raw output of kind ``source`` as one of kind ``target`` at the same ``x_t`` and ``t``; all (B, ...)."""
    if source == target:
        return raw
    return from_x0(to_x0(raw, source, x_t, schedule, t), target, x_t, schedule, t)


def add_noise(x0: Tensor, noise: Tensor, coefficients: Coefficients) -> Tensor:
    """x_t = alpha * x0 + sigma * noise; ``x0``, ``noise``: (B, ...), coefficients: (B,) each."""
    return renoise(x0, noise, coefficients.alpha, coefficients.sigma)


def transition(at_s: Coefficients, at_t: Coefficients, variance_min: float = 0.0) -> Coefficients:
    """What takes a sample from time s to a noisier t: x_t = alpha_ts * x_s + sigma_ts * noise, by :func:`add_noise`.

    alpha_ts = alpha_t / alpha_s, sigma_ts^2 = sigma_t^2 - alpha_ts^2 sigma_s^2, at least ``variance_min``. From a clean
    x_s (alpha 1, sigma 0) it is the schedule's own pair. All coefficients: (B,).
    """
    alpha = at_t.alpha / at_s.alpha
    variance = at_t.sigma**2 - (alpha * at_s.sigma) ** 2
    return Coefficients(alpha, variance.clamp(min=variance_min).sqrt())


def noise_from_x0(x0: Tensor, x_t: Tensor, coefficients: Coefficients) -> Tensor:
    """The noise that turns ``x0`` into ``x_t``: (x_t - alpha * x0) / sigma; (B, ...)."""
    return (x_t - expand(coefficients.alpha, x_t) * x0) * expand(1 / coefficients.sigma, x_t)


def ode_step(x_t: Tensor, x0: Tensor, now: Coefficients, then: Coefficients) -> Tensor:
    """One Euler (DDIM, eta 0) step of the probability-flow ODE, one rule for every family.

    x_next = alpha' * x0 + sigma' * (x_t - alpha * x0) / sigma (Song et al. 2021, DDIM, Eq. 12 with eta = 0).
    ``x_t``, ``x0``: (B, ...); ``now``, ``then``: coefficients at the present and the next time, (B,) each.
    """
    return add_noise(x0, noise_from_x0(x0, x_t, now), then)
