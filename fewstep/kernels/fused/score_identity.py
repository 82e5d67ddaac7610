"""The kernels of :mod:`fewstep.kernels.score_identity`: one pass to the losses, and one to the three gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels.fused.rows import ELEMENTWISE, ROW, alike, beside, launch, slices


@triton.jit
def _losses(x0, teacher, critic, weight, loss, alpha, length, piece, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * piece
    end = tl.minimum(begin + piece, length)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        at = row * length + at
        p = tl.load(teacher + at, mask=inside, other=0.0).to(tl.float32)
        difference = p - tl.load(critic + at, mask=inside, other=0.0).to(tl.float32)
        total += difference * (p - tl.load(x0 + at, mask=inside, other=0.0).to(tl.float32) - alpha * difference)
    value = tl.load(weight + row).to(tl.float32) * tl.sum(total, 0) / length
    tl.store(loss + row * tl.num_programs(0) + tl.program_id(0), value)


@triton.jit
def _gradients(
    x0, teacher, critic, factor, of_x0, of_teacher, of_critic, alpha, length, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    at = row * length + at
    k = tl.load(factor + row).to(tl.float32)
    p = tl.load(teacher + at, mask=inside, other=0.0).to(tl.float32)
    difference = k * (p - tl.load(critic + at, mask=inside, other=0.0).to(tl.float32))
    left = k * (p - tl.load(x0 + at, mask=inside, other=0.0).to(tl.float32))
    tl.store(of_x0 + at, (-difference).to(of_x0.dtype.element_ty), mask=inside)
    slope = left + (1 - 2 * alpha) * difference
    tl.store(of_teacher + at, slope.to(of_teacher.dtype.element_ty), mask=inside)
    tl.store(of_critic + at, (difference - slope).to(of_critic.dtype.element_ty), mask=inside)


def means(x0: Tensor, x0_teacher: Tensor, x0_critic: Tensor, alpha: float, weight: Tensor) -> Tensor:
    """As :func:`fewstep.kernels.score_identity.score_identity`, (B,), float32."""
    samples = alike(x0, x0_teacher, x0_critic)
    rows, length = len(x0), x0[0].numel()
    block, warps = launch(ROW, length)
    parts, piece = slices(length, block)
    loss = torch.empty((rows, parts), dtype=torch.float32, device=x0.device)
    _losses[parts, rows](*samples, beside(weight, x0), loss, float(alpha), length, piece, BLOCK=block, num_warps=warps)
    return loss.sum(1)


def gradients(x0: Tensor, x0_teacher: Tensor, x0_critic: Tensor, alpha: float, factor: Tensor) -> tuple[Tensor, ...]:
    """At the three samples (B, ...), in their dtypes; ``factor``: (B,), the loss's gradient times weight / entries."""
    samples = alike(x0, x0_teacher, x0_critic)
    found = tuple(torch.empty_like(sample) for sample in samples)
    length = x0[0].numel()
    block, warps = launch(ELEMENTWISE, length)
    grid = (triton.cdiv(length, block), len(x0))
    _gradients[grid](*samples, factor.contiguous(), *found, float(alpha), length, BLOCK=block, num_warps=warps)
    return found
