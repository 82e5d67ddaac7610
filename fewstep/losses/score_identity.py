"""Score identity distillation (SiD): the student's loss and its weights, in x0 space.

With the student's sample x0 noised to x_t, p = x0_teacher(x_t) and q = x0_critic(x_t), the loss is
w * (p - q) * ((p - x0) - alpha (p - q)) (Zhou et al. 2024, SiD, arXiv 2404.04057). Its gradient flows through p and q
too, to x_t and so to x0; only the weight carries none. One form serves every prediction type: differences of x0 at one
x_t are multiples of those of scores, noises and velocities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.diffusion.schedule import Coefficients
from fewstep.kernels.error_sums import error_sums
from fewstep.kernels.score_identity import elements
from fewstep.kernels.score_identity import score_identity as means

#: ``sid`` divides by the mean of |x0 - x0_teacher| over a sample (SiD); ``none`` is 1; the others are functions of a
#: flow's sigma, with snr = ((1 - sigma) / sigma)^2 (few-step SiD).
WEIGHTINGS = (
    "sid",
    "none",
    "1_minus_sigma",
    "1_minus_sigma_squared",
    "1_over_sigma",
    "1_over_sigma2",
    "snr_sqrt",
    "snr",
)

_SMALLEST_SIGMA = 1e-5  # where a weight divides by it


def score_identity(x0: Tensor, x0_teacher: Tensor, x0_critic: Tensor, alpha: float, weight: Tensor) -> Tensor:
    """SiD's loss for every element (B, ...), float32 or wider; the caller reduces it.

    All of x0, p and q keep their graphs. At alpha = 0.5 and the true scores the gradient is half that of the Fisher
    divergence; a larger alpha leans on the critic more. **The value is not a measure of progress**: at alpha near 1 it
    hovers around 0 and may be negative.

    Shapes: ``x0``, ``x0_teacher``, ``x0_critic``: (B, ...), any float dtype; ``weight``: (B,), without gradient.
    """
    return elements(x0, x0_teacher, x0_critic, alpha, weight)


def mean_score_identity(x0: Tensor, x0_teacher: Tensor, x0_critic: Tensor, alpha: float, weight: Tensor) -> Tensor:
    """The means over samples of :func:`score_identity`, (B,), with an explicit gradient; arguments as there."""
    return means(x0, x0_teacher, x0_critic, alpha, weight)


@torch.no_grad()
def score_identity_weight(
    weighting: str, x0: Tensor, x0_teacher: Tensor, coefficients: Coefficients, normalizer_min: float = 1e-5
) -> Tensor:
    """The weight w (B,) of each sample, without gradient, float32 or wider.

    Shapes: ``x0``, ``x0_teacher``: (B, ...); ``coefficients``: alpha and sigma (B,) of x_t.
        ``normalizer_min``: lower bound of the mean error in ``sid``; where that is 0, so is the weight.

    Raises:
        ValueError: an unknown weighting.
    """
    error = error_sums(x0, x0_teacher, "absolutes") / x0[0].numel()
    sigma = coefficients.sigma.to(error)
    divisor = sigma.clamp(min=_SMALLEST_SIGMA)
    weights = {
        "sid": lambda: error.clamp(min=normalizer_min).reciprocal().nan_to_num(posinf=0.0),
        "none": lambda: torch.ones_like(error),
        "1_minus_sigma": lambda: 1 - sigma,
        "1_minus_sigma_squared": lambda: (1 - sigma) ** 2,
        "1_over_sigma": lambda: 1 / divisor,
        "1_over_sigma2": lambda: 1 / divisor**2,
        "snr_sqrt": lambda: (1 - sigma) / divisor,
        "snr": lambda: ((1 - sigma) / divisor) ** 2,
    }
    if weighting not in weights:
        raise ValueError(f"unknown weighting {weighting!r}; known: {', '.join(WEIGHTINGS)}")
    return weights[weighting]()
