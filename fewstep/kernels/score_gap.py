"""Where critic and teacher disagree, as a gradient on the student's sample: the core of distribution matching."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.kernels.dispatch import choose, refuse_tangents
from fewstep.kernels.rows import aligned, at_least_float32, expand, of_one_shape, of_samples


@torch.no_grad()
def score_gap(
    x0_critic: Tensor,
    x0_teacher: Tensor,
    x0: Tensor | None = None,
    reference_x0: Tensor | None = None,
    weight: Tensor | None = None,
    normalizer_min: float = 0.0,
    normalizer_eps: float = 0.0,
    negative: Tensor | None = None,
    positive: Tensor | None = None,
    share: float | Tensor = 1.0,
    other_reference: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss () 0.5 mean(g^2) and its gradient g / numel (B, ...), both float32 or wider and without a graph.

    g = weight (x0_critic - x0_teacher) / n, where n is the mean of |x0 - reference| over a sample, at least
    ``normalizer_min``, plus ``normalizer_eps``; without ``x0`` it is 1 (Yin et al. 2024, DMD, Eq. 7-8). With a
    ``negative`` there is a second term, share (negative - positive) / n', n' by another reference (Decoupled DMD). What
    is not finite in g is 0. Differences are taken before anything is multiplied, so float32 is enough: in the place of
    x0 both networks may say any other output at one x_t, its factor in ``weight``.

    Shapes: all samples (B, ...), any float dtype; ``reference_x0`` is the teacher's x0 by default, ``other_reference``
        the ``positive``. ``weight``: (B,). ``share``: a number, (B,), or with as many axes as the samples.

    Raises:
        NotImplementedError: the Triton form is differentiated forward.
    """
    arguments = (x0_critic, x0_teacher, x0, reference_x0, weight, normalizer_min, normalizer_eps)
    second = (negative, positive, share, other_reference)
    samples = [value for value in (*arguments[:4], negative, positive, other_reference) if isinstance(value, Tensor)]
    form = choose("score_gap", *samples, triton=of_samples(share, len(x0_critic)) and of_one_shape(*samples))
    if form == "reference":
        return reference(*arguments, *second)
    if form == "closed":
        return closed(*arguments, *second)
    refuse_tangents("score_gap", *samples, weight, share if isinstance(share, Tensor) else None)
    from fewstep.kernels.fused import score_gap as fused

    return fused.score_gap(*arguments, *second)


@torch.no_grad()
def reference(
    x0_critic: Tensor,
    x0_teacher: Tensor,
    x0: Tensor | None = None,
    reference_x0: Tensor | None = None,
    weight: Tensor | None = None,
    normalizer_min: float = 0.0,
    normalizer_eps: float = 0.0,
    negative: Tensor | None = None,
    positive: Tensor | None = None,
    share: float | Tensor = 1.0,
    other_reference: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition; arguments and results as in :func:`score_gap`, () and (B, ...)."""

    def normalized(gap: Tensor, near: Tensor) -> Tensor:
        if x0 is None:
            return gap
        distance = (at_least_float32(x0) - at_least_float32(near)).abs().flatten(1).mean(1)
        return gap / expand(distance.clamp(min=normalizer_min) + normalizer_eps, gap)

    gap = at_least_float32(x0_critic) - at_least_float32(x0_teacher)
    direction = normalized(gap, x0_teacher if reference_x0 is None else reference_x0)
    if negative is not None and positive is not None:
        guidance = at_least_float32(negative) - at_least_float32(positive)
        guidance = guidance * aligned(share, gap) if isinstance(share, Tensor) else guidance * share
        direction = direction + normalized(guidance, positive if other_reference is None else other_reference)
    if weight is not None:
        direction = expand(weight, direction) * direction
    direction = torch.nan_to_num(direction, nan=0.0, posinf=0.0, neginf=0.0)
    return 0.5 * direction.square().mean(), direction / direction.numel()


@torch.no_grad()
def closed(
    x0_critic: Tensor,
    x0_teacher: Tensor,
    x0: Tensor | None = None,
    reference_x0: Tensor | None = None,
    weight: Tensor | None = None,
    normalizer_min: float = 0.0,
    normalizer_eps: float = 0.0,
    negative: Tensor | None = None,
    positive: Tensor | None = None,
    share: float | Tensor = 1.0,
    other_reference: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One factor for each sample, and the rest in place; as :func:`score_gap`, () and (B, ...)."""
    gradient = at_least_float32(x0_critic) - at_least_float32(x0_teacher)
    size = gradient.numel()

    def factor(near: Tensor) -> Tensor:
        """Weight over normaliser and numel, (B, 1, ...)."""
        numerator = torch.ones_like(gradient[:, :1].flatten(1)[:, 0]) if weight is None else weight.to(gradient)
        if x0 is not None:
            distance = (at_least_float32(x0) - at_least_float32(near)).abs_().flatten(1).mean(1)
            numerator = numerator / (distance.clamp(min=normalizer_min) + normalizer_eps)
        return expand(numerator / size, gradient)

    gradient.mul_(factor(x0_teacher if reference_x0 is None else reference_x0))
    if negative is not None and positive is not None:
        scale = aligned(share, gradient) if isinstance(share, Tensor) else share
        guidance = at_least_float32(negative) - at_least_float32(positive)
        gradient.addcmul_(guidance, scale * factor(positive if other_reference is None else other_reference))
    gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return gradient.square().sum() * (0.5 * size), gradient


def example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Any]:
    """Arguments of :func:`score_gap` for samples of a shape (B, ...): distribution matching, weighted."""
    generator = torch.Generator().manual_seed(seed)
    x0, x0_teacher, other = (torch.randn(shape, generator=generator) for _ in range(3))
    weight = torch.rand(len(x0), generator=generator, dtype=torch.float64) + 0.5
    samples = {"x0_critic": torch.lerp(x0_teacher, other, 0.1), "x0_teacher": x0_teacher, "x0": x0}
    placed = {name: sample.to(device, dtype) for name, sample in samples.items()}
    return placed | {"weight": weight.to(device), "normalizer_min": 1e-5}
