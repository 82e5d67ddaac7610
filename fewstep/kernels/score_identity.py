"""Score identity distillation: the loss of each sample, whose gradient flows through sample, teacher and critic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fewstep.kernels.dispatch import choose, refuse_tangents
from fewstep.kernels.rows import at_least_float32, expand, of_one_shape


def score_identity(x0: Tensor, x0_teacher: Tensor, x0_critic: Tensor, alpha: float, weight: Tensor) -> Tensor:
    """The mean over each sample of w D ((p - x0) - alpha D) (B,), D = p - q, p the teacher's x0 and q the critic's.

    Its gradient is explicit, with R = p - x0 and k = w / entries: -k D at x0, k (R + (1 - 2 alpha) D) at p, and
    k (2 alpha D - R) at q; nothing but the three samples is kept for it (Zhou et al. 2024, SiD).

    Shapes: ``x0``, ``x0_teacher``, ``x0_critic``: (B, ...), any float dtype; ``weight``: (B,), without gradient. In
        float32 at least.

    Raises:
        NotImplementedError: another form than the reference is differentiated forward.
    """
    samples = x0, x0_teacher, x0_critic
    form = choose("score_identity", *samples, triton=of_one_shape(*samples))
    if form == "reference":
        return reference(x0, x0_teacher, x0_critic, alpha, weight)
    if form == "closed":
        return closed(x0, x0_teacher, x0_critic, alpha, weight)
    return _means(x0, x0_teacher, x0_critic, alpha, weight, triton=True)


def elements(x0: Tensor, x0_teacher: Tensor, x0_critic: Tensor, alpha: float, weight: Tensor) -> Tensor:
    """What :func:`score_identity` averages, (B, ...), in the words of the paper."""
    x0, x0_teacher, x0_critic = (at_least_float32(x) for x in (x0, x0_teacher, x0_critic))
    difference = x0_teacher - x0_critic
    return expand(weight.detach(), difference) * difference * ((x0_teacher - x0) - alpha * difference)


def reference(x0: Tensor, x0_teacher: Tensor, x0_critic: Tensor, alpha: float, weight: Tensor) -> Tensor:
    """The definition; arguments as in :func:`score_identity`, (B,)."""
    return elements(x0, x0_teacher, x0_critic, alpha, weight).flatten(1).mean(1)


def closed(x0: Tensor, x0_teacher: Tensor, x0_critic: Tensor, alpha: float, weight: Tensor) -> Tensor:
    """Two samples in memory each way; arguments as in :func:`score_identity`, (B,)."""
    if torch.compiler.is_compiling():
        return reference(x0, x0_teacher, x0_critic, alpha, weight)  # which it fuses by itself
    return _means(x0, x0_teacher, x0_critic, alpha, weight, triton=False)


def example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Any]:
    """Arguments of :func:`score_identity` for samples of a shape (B, ...), all of which ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    x0, teacher, other = (torch.randn(shape, generator=generator) for _ in range(3))
    weight = torch.rand(len(x0), generator=generator) + 0.5
    samples = {"x0": x0, "x0_teacher": teacher, "x0_critic": torch.lerp(teacher, other, 0.1)}
    placed = {name: sample.to(device, dtype).requires_grad_() for name, sample in samples.items()}
    return placed | {"alpha": 1.2, "weight": weight.to(device)}


def _means(x0: Tensor, x0_teacher: Tensor, x0_critic: Tensor, alpha: float, weight: Tensor, triton: bool) -> Tensor:
    refuse_tangents("score_identity", x0, x0_teacher, x0_critic, weight)
    means: Tensor = _ScoreIdentity.apply(x0, x0_teacher, x0_critic, alpha, weight.detach(), triton)
    return means


class _ScoreIdentity(Function):
    """Both forms that are no plain torch, with their gradient."""

    @staticmethod
    def forward(
        x0: Tensor, x0_teacher: Tensor, x0_critic: Tensor, alpha: float, weight: Tensor, triton: bool
    ) -> Tensor:
        if triton:
            from fewstep.kernels.fused import score_identity as fused

            return fused.means(x0, x0_teacher, x0_critic, alpha, weight)
        teacher = at_least_float32(x0_teacher)
        difference = teacher - at_least_float32(x0_critic)
        values = (teacher - at_least_float32(x0)).sub_(difference, alpha=alpha).mul_(difference)
        return weight.to(values) * values.flatten(1).mean(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x0, x0_teacher, x0_critic, ctx.alpha, weight, ctx.triton = inputs
        ctx.save_for_backward(x0, x0_teacher, x0_critic, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x0, x0_teacher, x0_critic, weight = ctx.saved_tensors
        factor = gradient * weight.to(gradient) / x0[0].numel()
        if ctx.triton:
            from fewstep.kernels.fused import score_identity as fused

            return *fused.gradients(x0, x0_teacher, x0_critic, ctx.alpha, factor), None, None, None
        teacher = at_least_float32(x0_teacher)
        difference = (teacher - at_least_float32(x0_critic)).mul_(expand(factor, teacher))
        of_teacher = (teacher - at_least_float32(x0)).mul_(expand(factor, teacher))
        of_teacher.add_(difference, alpha=1 - 2 * ctx.alpha)
        of_critic = difference - of_teacher
        found = zip((difference.neg_(), of_teacher, of_critic), (x0, x0_teacher, x0_critic))
        return *(one.to(sample.dtype) for one, sample in found), None, None, None
