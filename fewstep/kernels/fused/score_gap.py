"""The kernels of :mod:`fewstep.kernels.score_gap`: one pass to the normalisers, and one to gradient and loss."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels.fused.error_sums import partial_sums
from fewstep.kernels.fused.rows import ROW, alike, beside, launch, slices


@triton.jit
def _over_normalizer(partial, row, length, least, eps, PARTS: tl.constexpr):
    distance = tl.sum(tl.load(partial + row * PARTS + tl.arange(0, PARTS)), 0) / length
    return 1 / (tl.maximum(distance, least, propagate_nan=tl.PropagateNan.ALL) + eps)


@triton.jit
def _gap(
    critic, teacher, negative, positive, near, other_near, weight, shares, gradient, loss,
    share, least, eps, size, length, piece,
    NORMALIZED: tl.constexpr, WEIGHTED: tl.constexpr, TWO: tl.constexpr, SHARES: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * piece
    end = tl.minimum(begin + piece, length)
    factor = 1.0 / size
    if WEIGHTED:
        factor = factor * tl.load(weight + row).to(tl.float32)
    other_factor = factor * share
    if SHARES:
        other_factor = factor * tl.load(shares + row).to(tl.float32)
    if NORMALIZED:
        factor = factor * _over_normalizer(near, row, length, least, eps, PARTS)
        if TWO:
            other_factor = other_factor * _over_normalizer(other_near, row, length, least, eps, PARTS)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        at = row * length + at
        g = tl.load(critic + at, mask=inside, other=0.0).to(tl.float32)
        g = (g - tl.load(teacher + at, mask=inside, other=0.0).to(tl.float32)) * factor
        if TWO:
            away = tl.load(negative + at, mask=inside, other=0.0).to(tl.float32)
            g += (away - tl.load(positive + at, mask=inside, other=0.0).to(tl.float32)) * other_factor
        g = tl.where(tl.abs(g) < float("inf"), g, 0.0)  # also where it is no number
        tl.store(gradient + at, g, mask=inside)
        total += tl.where(inside, g * g, 0.0)
    tl.store(loss + row * tl.num_programs(0) + tl.program_id(0), 0.5 * size * tl.sum(total, 0))


def score_gap(
    x0_critic: Tensor,
    x0_teacher: Tensor,
    x0: Tensor | None,
    reference_x0: Tensor | None,
    weight: Tensor | None,
    normalizer_min: float,
    normalizer_eps: float,
    negative: Tensor | None,
    positive: Tensor | None,
    share: float | Tensor,
    other_reference: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As :func:`fewstep.kernels.score_gap.score_gap`, () and (B, ...)."""
    two = negative is not None
    others = (x0_critic, x0_teacher) if negative is None or positive is None else (negative, positive)
    critic, teacher, away, towards = alike(x0_critic, x0_teacher, *others)
    gradient = torch.empty_like(critic, dtype=torch.float32)
    rows, length = len(critic), critic[0].numel()
    block, warps = launch(ROW, length)
    parts, piece = slices(length, block)
    near = other_near = loss = torch.empty((rows, parts), dtype=torch.float32, device=critic.device)
    if x0 is not None:
        near = partial_sums(x0, x0_teacher if reference_x0 is None else reference_x0, "absolutes", 0.0)
        if two:
            other_near = partial_sums(x0, towards if other_reference is None else other_reference, "absolutes", 0.0)
    per_sample = beside(share, critic) if isinstance(share, Tensor) else None
    _gap[parts, rows](
        critic,
        teacher,
        away,
        towards,
        near,
        other_near,
        near if weight is None else beside(weight, critic),
        near if per_sample is None else per_sample,
        gradient,
        loss,
        1.0 if isinstance(share, Tensor) else float(share),
        float(normalizer_min),
        float(normalizer_eps),
        float(gradient.numel()),
        length,
        piece,
        NORMALIZED=x0 is not None,
        WEIGHTED=weight is not None,
        TWO=two,
        SHARES=per_sample is not None,
        PARTS=parts,
        BLOCK=block,
        num_warps=warps,
    )
    return loss.sum(), gradient
