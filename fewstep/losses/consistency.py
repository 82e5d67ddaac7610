"""Consistency models as pure functions: boundary conditions, distances, weights, curricula, mappings of noise levels.

``sigma`` is EDM's noise level, noise over signal (sigma / alpha of a schedule), so that constants that were found for
EDM hold under every schedule. Everything about times is float64.

- CM: Song et al. 2023, arXiv 2303.01469 (distillation CD, training CT)
- iCT: Song & Dhariwal 2023, arXiv 2310.14189
- LCM: Luo et al. 2023, arXiv 2310.04378
- ECT: Geng et al. 2024, arXiv 2406.14548
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.kernels.error_sums import error_sums
from fewstep.losses.huber import norm, pseudo_huber_of

DISTANCES = ("mse", "l1", "l2_norm", "l2_norm_squared", "pseudo_huber_norm", "pseudo_huber_elementwise")
#: (skip, out), each (B,), of f = skip * x_t + out * x0 at times t (B,).
Boundary = Callable[[Tensor], tuple[Tensor, Tensor]]
WEIGHTINGS = ("uniform", "karras", "1/(t-r)", "1/sqrt(t-r)", "1/c_out", "1/c_out^2", "1/sigma", "1/sigma^2")


# --- the boundary condition f(x, t_min) = x ---------------------------------------------------------------------------


def lcm_scalings(timestep: Tensor, scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """(skip, out), each (B,), of LCM's f = skip * x_t + out * x0 (App. C), with s = scaling * timestep.

    skip = sigma_data^2 / (s^2 + sigma_data^2), out = s / sqrt(s^2 + sigma_data^2). At timestep 0 this is (1, 0), at
    timestep 19 already (7e-6, 1 - 3e-6): a boundary at the table's first entry and nowhere else.
    """
    s = scaling * timestep.double()
    return sigma_data**2 / (s**2 + sigma_data**2), s / (s**2 + sigma_data**2).sqrt()


def shifted_edm_scalings(sigma: Tensor, sigma_min: float, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out), each (B,), of CM's f = c_skip * x_t + c_out * F (App. C): EDM's, exactly (1, 0) at sigma_min.

    EDM's with sigma - sigma_min in the place of sigma, but not under the root of c_out. No stock scheduler samples a
    student of an EDM teacher with them, so the trainer uses EDM's own and :func:`hard_boundary`; the two differ by
    sigma_min / sigma.
    """
    sigma = sigma.double()
    above = sigma - sigma_min
    skip = sigma_data**2 / (above**2 + sigma_data**2)
    return skip, above * sigma_data / (sigma**2 + sigma_data**2).sqrt()


def hard_boundary(t: Tensor, lowest: float) -> tuple[Tensor, Tensor]:
    """(skip, out), each (B,), of f = skip * x_t + out * x0: (1, 0) at and below the time ``lowest``, else (0, 1)."""
    skip = (t <= lowest + 1e-9).double()
    return skip, 1 - skip


# --- distance and weight ----------------------------------------------------------------------------------------------


def distance(kind: str, a: Tensor, b: Tensor, c: float = 0.0) -> Tensor:
    """How far apart ``a`` and ``b`` (B, ...) are, for each sample: (B,).

    ``mse`` and ``l1`` are means over a sample; ``l2_norm`` and ``l2_norm_squared`` norms of the whole sample;
    ``pseudo_huber_norm`` is sqrt(|a - b|^2 + c^2) - c of the whole sample (iCT, Eq. 7), and
    ``pseudo_huber_elementwise`` the mean of sqrt(d^2 + c^2) - c over its numbers (LCM's released code).

    Raises:
        ValueError: an unknown kind.
    """
    entries = a[0].numel()
    if kind == "mse":
        return error_sums(a, b) / entries
    if kind == "l1" or (kind == "pseudo_huber_elementwise" and c == 0):
        return error_sums(a, b, "absolutes") / entries
    if kind == "l2_norm_squared":
        return error_sums(a, b)
    if kind == "l2_norm":
        return norm(error_sums(a, b))
    if kind == "pseudo_huber_norm":
        return pseudo_huber_of(error_sums(a, b), c)
    if kind == "pseudo_huber_elementwise":
        return error_sums(a, b, "pseudo_huber", c) / entries
    raise ValueError(f"unknown distance {kind!r}; known: {', '.join(DISTANCES)}")


def weight(kind: str, sigma_t: Tensor, sigma_r: Tensor, sigma_data: float = 0.5) -> Tensor:
    """The weight lambda (B,), float64, of a distance between noise levels ``sigma_t`` > ``sigma_r`` (B,).

    ``uniform`` 1; ``karras`` 1/sigma_t^2 + 1/sigma_data^2; ``1/(t-r)`` 1/(sigma_t - sigma_r) (iCT, Eq. 9; ECT) and its
    root; the others are powers of sigma_t or of EDM's c_out = sigma_t sigma_data / sqrt(sigma_t^2 + sigma_data^2).

    Raises:
        ValueError: an unknown kind.
    """
    sigma_t, sigma_r = sigma_t.double(), sigma_r.double()
    c_out = sigma_t * sigma_data / (sigma_t**2 + sigma_data**2).sqrt()
    powers = {
        "1/(t-r)": (sigma_t - sigma_r, 1.0),
        "1/sqrt(t-r)": (sigma_t - sigma_r, 0.5),
        "1/c_out": (c_out, 1.0),
        "1/c_out^2": (c_out, 2.0),
        "1/sigma": (sigma_t, 1.0),
        "1/sigma^2": (sigma_t, 2.0),
    }
    if kind == "uniform":
        return torch.ones_like(sigma_t)
    if kind == "karras":
        return sigma_t**-2 + sigma_data**-2
    if kind in powers:
        base, power = powers[kind]
        return base**-power
    raise ValueError(f"unknown weighting {kind!r}; known: {', '.join(WEIGHTINGS)}")


# --- discretisations --------------------------------------------------------------------------------------------------


# --- guidance as an input ---------------------------------------------------------------------------------------------
