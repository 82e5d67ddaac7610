"""Consistency models as pure functions: boundary conditions, distances, weights, curricula, mappings of noise levels.

``sigma`` is EDM's noise level, noise over signal (sigma / alpha of a schedule), so that constants that were found for
EDM hold under every schedule. Everything about times is float64.

- CM: Song et al. 2023, arXiv 2303.01469 (distillation CD, training CT)
- iCT: Song & Dhariwal 2023, arXiv 2310.14189
- LCM: Luo et al. 2023, arXiv 2310.04378
- ECT: Geng et al. 2024, arXiv 2406.14548
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.losses.huber import pseudo_huber

DISTANCES = ("mse", "l1", "l2_norm", "l2_norm_squared", "pseudo_huber_norm", "pseudo_huber_elementwise")
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
    difference = (a - b).flatten(1)
    if kind == "mse":
        return difference.square().mean(1)
    if kind == "l1":
        return difference.abs().mean(1)
    if kind == "l2_norm_squared":
        return difference.square().sum(1)
    if kind == "l2_norm":
        return torch.linalg.vector_norm(difference, dim=1)
    if kind == "pseudo_huber_norm":
        return pseudo_huber(difference, c)
    if kind == "pseudo_huber_elementwise":
        if c == 0:
            return difference.abs().mean(1)
        squared = difference.square()
        return (squared / ((squared + c**2).sqrt() + c)).mean(1)  # as in fewstep.losses.huber
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


def karras_levels(count: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """``count`` noise levels from sigma_min to sigma_max, ascending: float64 (N,) (Karras et al. 2022, Eq. 5)."""
    ramp = torch.linspace(sigma_min ** (1 / rho), sigma_max ** (1 / rho), count, dtype=torch.float64)
    levels = ramp**rho
    levels[0], levels[-1] = sigma_min, sigma_max  # the ends themselves, not but for rounding
    return levels


def lognormal_bins(levels: Tensor, mean: float = -1.1, std: float = 2.0) -> Tensor:
    """iCT's probability (N - 1,) of each interval of ``levels`` (N,), ascending: P(i) of Eq. 10.

    P(i) ~ erf((ln sigma_{i+1} - mean) / (sqrt(2) std)) - erf((ln sigma_i - mean) / (sqrt(2) std)).
    """
    edges = torch.erf((levels.double().log() - mean) / (math.sqrt(2) * std))
    share = edges.diff()
    return share / share.sum()


def doubling_levels(step: int, steps: int, first: int = 10, last: int = 1280) -> int:
    """iCT's number of levels N(k) = min(s0 2^floor(k / K'), s1) + 1 with K' = floor(K / (log2 floor(s1 / s0) + 1)).

    ``step`` is k of K ``steps``, ``first`` s0 and ``last`` s1 (§3.4).
    """
    stage_steps = max(1, int(steps / (math.log2(last // first) + 1)))
    return min(first * 2 ** (step // stage_steps), last) + 1


def progressive_levels(step: int, steps: int, first: int = 2, last: int = 150) -> int:
    """CT's number of levels N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 (App. C)."""
    squared = step / steps * ((last + 1) ** 2 - first**2) + first**2
    return max(1, math.ceil(math.sqrt(squared) - 1)) + 1


def adaptive_decay(step: int, steps: int, first: int = 2, last: int = 150, decay: float = 0.95) -> float:
    """CT's decay of the target network, mu(k) = exp(s0 ln(mu0) / (N(k) - 1)) (App. C)."""
    return math.exp(first * math.log(decay) / (progressive_levels(step, steps, first, last) - 1))


def ect_gap(stage: int, q: float = 2.0) -> float:
    """How far apart ECT's two times are in a stage: q^-(stage + 1), which shrinks to 0."""
    return q ** -(stage + 1)


def ect_mapping(sigma: Tensor, gap: float, k: float = 8.0, b: float = 1.0) -> Tensor:
    """ECT's lower noise level r = max(0, sigma (1 - gap n)), n = 1 + k sigmoid(-b sigma); (B,) both (§3.2).

    With k = 0 the share n is constant. Where r is 0 the target is the clean sample.
    """
    sigma = sigma.double()
    return (sigma * (1 - gap * (1 + k * torch.sigmoid(-b * sigma)))).clamp(min=0)


# --- guidance as an input ---------------------------------------------------------------------------------------------


def guidance_embedding(guidance_scale: Tensor, size: int = 256, period: float = 1e4, scale: float = 1e3) -> Tensor:
    """LCM's embedding (B, size) of ``guidance_scale`` (B,): sines, then cosines, of scale * (w - 1) at many rates.

    LCM writes guidance as c + w' (c - u); diffusers' w is w' + 1, and pipelines embed w' likewise.
    """
    half = size // 2
    rates = torch.exp(-math.log(period) / (half - 1) * torch.arange(half, dtype=torch.float64))
    phase = scale * (guidance_scale.double() - 1)[:, None] * rates.to(guidance_scale.device)
    return torch.cat([phase.sin(), phase.cos()], 1)
