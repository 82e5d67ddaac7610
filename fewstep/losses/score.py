"""Distribution matching (DMD2 and its relatives) and the critic's denoising loss, in x0 space."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fewstep.diffusion.prediction import expand, transition, x0_map
from fewstep.diffusion.schedule import Coefficients, NoiseSchedule
from fewstep.kernels.error_sums import error_sums
from fewstep.kernels.renoise import renoise
from fewstep.kernels.score_gap import score_gap


class Matching(NamedTuple):
    """A loss value () for the log, and its gradient with respect to the student's x0 (B, ...)."""

    loss: Tensor
    gradient: Tensor


def distribution_matching(
    x0: Tensor,
    x0_teacher: Tensor,
    x0_critic: Tensor,
    normalizer_min: float = 0.0,
    weight: Tensor | None = None,
    normalizer_eps: float = 0.0,
) -> Matching:
    """The DM gradient (Yin et al. 2024, DMD, Eq. 7-8; DMD2, §3): direction g = (x0_critic - x0_teacher) / n.

    n is the mean of |x0 - x0_teacher| over each sample, at least ``normalizer_min``, plus ``normalizer_eps``. The loss
    0.5 * mean(g^2) has the gradient g / numel at x0, which is handed over directly. Where a sample has n = 0 (or
    anything else that is not finite) its gradient is 0. **The value of this loss is not a measure of progress**: it is
    a normalised gradient.

    Shapes: ``x0``, ``x0_teacher``, ``x0_critic``: (B, ...), any float dtype; computed in float32 or wider.
        ``weight``: (B,) factor on g, optional.
    """
    return Matching(*score_gap(x0_critic, x0_teacher, x0, None, weight, normalizer_min, normalizer_eps))


def decoupled_matching(
    x0: Tensor,
    matching: tuple[Tensor, Tensor],
    augmentation: tuple[Tensor, Tensor],
    guidance_scale: float | Tensor,
    references: tuple[Tensor, Tensor],
    normalizer_min: float = 0.0,
) -> Matching:
    """The DM gradient in two terms that looked at x0 at times of their own (Decoupled DMD, arXiv 2511.22677).

    With w the guidance, x0_guided - x0_critic is the sum of a matching term, x0_positive - x0_critic, and of guidance
    augmentation, (w - 1) (x0_positive - x0_negative). Each is divided by the mean of |x0 - reference| over the sample.
    At one x_t for both, with the guided x0 as reference, this is :func:`distribution_matching`.

    Args:
        x0: the student's (B, ...), as are all others.
        matching: (x0_positive, x0_critic) at the one time.
        augmentation: (x0_positive, x0_negative) at the other.
        guidance_scale: w, a number or (B, 1, ...).
        references: what normalises matching and augmentation. The paper does not say; this is our reading.
        normalizer_min: lower bound of either normaliser.
    """
    positive, critic = matching
    guided, negative = augmentation
    return Matching(
        *score_gap(
            critic,
            positive,
            x0,
            references[0],
            normalizer_min=normalizer_min,
            negative=negative,
            positive=guided,
            share=guidance_scale - 1,
            other_reference=references[1],
        )
    )


def score_distillation(x0_teacher: Tensor, x0_critic: Tensor, weight: Tensor) -> Matching:
    """The gradient without a normaliser: g = weight * (x0_critic - x0_teacher); loss and gradient as in DMD.

    With weight = alpha * sigma it is sigma^2 (noise_teacher - noise_critic), variational score distillation as in
    SwiftBrush (Nguyen & Tran 2024).

    Shapes: ``x0_teacher``, ``x0_critic``: (B, ...); ``weight``: (B,).
    """
    return Matching(*score_gap(x0_critic, x0_teacher, weight=weight))


class CriticTarget(NamedTuple):
    """What a critic is to predict, as x0 and as noise (B, ...); in any other output it is the same combination."""

    x0: Tensor
    noise: Tensor


def subinterval_target(
    x_s: Tensor, noise: Tensor, at_s: Coefficients, at_t: Coefficients, variance_min: float = 0.0
) -> CriticTarget:
    """The critic's target for x_t = alpha_ts x_s + sigma_ts noise, where no clean sample exists, only ``x_s`` at s < t.

    Its mean given x_t is the exact x0 (and noise) of the marginal at t, which ``x_s`` itself taken as clean is not:

        noise target = sigma_t / sigma_ts * noise
        x0 target    = x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 sigma_ts) * noise

    The score of the marginal is the mean of the transition's own, -noise / sigma_ts; the x0 target follows from it
    (Phased DMD, arXiv 2510.27684, for flow; the other kinds are our derivation). At a clean x_s (alpha 1, sigma 0) they
    are ``x_s`` and ``noise``.

    Shapes: ``x_s``, ``noise``: (B, ...); coefficients: (B,) each; ``variance_min``: as in
        :func:`fewstep.diffusion.prediction.transition`.
    """
    sigma_ts = transition(at_s, at_t, variance_min).sigma
    share = at_t.alpha * at_s.sigma**2 / (at_s.alpha**2 * sigma_ts)
    x0 = renoise(x_s, noise, 1 / at_s.alpha, -share)
    return CriticTarget(x0, expand(at_t.sigma / sigma_ts, x_s) * noise)


def subinterval_weight(at_s: Coefficients, at_t: Coefficients, cap: float) -> Tensor:
    """min(1, cap sigma_ts^2) (B,): the weight on the squared error of :func:`subinterval_target`, noisy as t -> s.

    Phased DMD multiplies the residual by sigma_ts and its square by min(1 / sigma_ts^2, cap), cap = 10. sigma_ts is
    flow matching's, sigma_ts / (alpha_t + sigma_t), so that one SNR has one weight in every family.
    """
    sigma_ts = transition(at_s, at_t).sigma / (at_t.alpha + at_t.sigma)
    return (cap * sigma_ts**2).clamp(max=1.0)


def denoising_loss(x0: Tensor, x0_predicted: Tensor, weight: Tensor) -> Tensor:
    """mean(weight * (x0_predicted - x0)^2): the critic's loss on the student's samples, never with guidance.

    Shapes: ``x0`` (no gradient flows to it), ``x0_predicted``: (B, ...); ``weight``: (B,). Returns ().
    Source: Yin et al. 2024 (DMD2), §3; the weight decides in which space the mean square is taken.
    """
    error = error_sums(x0_predicted, x0.detach()) / x0[0].numel()
    return (weight.to(error.device, error.dtype) * error).mean()


def native_weight(prediction_type: str, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """The weight (B,) that turns an x0 error into the squared error of the network's own output at ``t`` (B,).

    Epsilon networks get the plain noise error, v and flow networks the velocity error; EDM gets
    sigma^-2 + sigma_data^-2 (Karras et al. 2022, Table 1) by the same rule.
    """
    _, out = x0_map(prediction_type, schedule, t)
    return out**-2
