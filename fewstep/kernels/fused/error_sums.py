"""The kernels of :mod:`fewstep.kernels.error_sums`: one pass to the sums, and one to the gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels.fused.rows import ELEMENTWISE, ROW, alike, launch, slices

_KINDS = {"squares": 0, "absolutes": 1, "pseudo_huber": 2}


@triton.jit
def _sum(a, b, partial, c, length, piece, KIND: tl.constexpr, PAIR: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * piece
    end = tl.minimum(begin + piece, length)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        error = tl.load(a + row * length + at, mask=inside, other=0.0).to(tl.float32)
        if PAIR:
            error -= tl.load(b + row * length + at, mask=inside, other=0.0).to(tl.float32)
        if KIND == 0:
            total += error * error
        elif KIND == 1:
            total += tl.abs(error)
        else:
            total += error * error / (tl.sqrt(error * error + c * c) + c)
    tl.store(partial + row * tl.num_programs(0) + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _slope(a, b, gradient, slope, c, length, KIND: tl.constexpr, PAIR: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    at = row * length + at
    error = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    if PAIR:
        error -= tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    if KIND == 0:
        rate = 2 * error
    elif KIND == 1:
        rate = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, 0.0))
    else:
        rate = error / tl.sqrt(error * error + c * c)
    tl.store(slope + at, tl.load(gradient + row).to(tl.float32) * rate, mask=inside)


def sums(a: Tensor, b: Tensor | None, kind: str, c: float) -> Tensor:
    """As :func:`fewstep.kernels.error_sums.error_sums`, (B,), float32."""
    return partial_sums(a, b, kind, c).sum(1)


def partial_sums(a: Tensor, b: Tensor | None, kind: str, c: float) -> Tensor:
    """The sums in the parts of a row that :func:`fewstep.kernels.fused.rows.slices` makes, (B, parts), float32."""
    a, b = alike(a, a if b is None else b)
    length = a[0].numel()
    block, warps = launch(ROW, length)
    parts, piece = slices(length, block)
    partial = torch.empty((len(a), parts), dtype=torch.float32, device=a.device)
    flags = {"KIND": _KINDS[kind], "PAIR": a is not b, "BLOCK": block}
    _sum[parts, len(a)](a, b, partial, float(c), length, piece, **flags, num_warps=warps)
    return partial


def slopes(a: Tensor, b: Tensor | None, kind: str, c: float, gradient: Tensor) -> Tensor:
    """``gradient`` (B,) of the sums times the derivative of the error's value (B, ...), float32."""
    a, b = alike(a, a if b is None else b)
    slope = torch.empty_like(a, dtype=torch.float32)
    length = a[0].numel()
    block, warps = launch(ELEMENTWISE, length)
    flags = {"KIND": _KINDS[kind], "PAIR": a is not b, "BLOCK": block}
    grid = (triton.cdiv(length, block), len(a))
    _slope[grid](a, b, gradient.contiguous(), slope, float(c), length, **flags, num_warps=warps)
    return slope
