"""The kernel of :mod:`fewstep.kernels.guided_x0`: every entry is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels.fused.rows import ELEMENTWISE, alike, beside, launch


@triton.jit
def _kernel(
    x_t, skip, out, positive, negative, scales, scale, x0, length,
    GUIDED: tl.constexpr, PER_SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    at = row * length + at
    raw = tl.load(positive + at, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        w = scale
        if PER_SAMPLE:
            w = tl.load(scales + row).to(tl.float32)
        away = tl.load(negative + at, mask=inside, other=0.0).to(tl.float32)
        raw = away + w * (raw - away)
    kept = tl.load(skip + row).to(tl.float32) * tl.load(x_t + at, mask=inside, other=0.0).to(tl.float32)
    clean = kept + tl.load(out + row).to(tl.float32) * raw
    tl.store(x0 + at, clean.to(x0.dtype.element_ty), mask=inside)


def guided_x0(
    x_t: Tensor, skip: Tensor, out: Tensor, positive: Tensor, negative: Tensor | None, scale: float | Tensor
) -> Tensor:
    """As :func:`fewstep.kernels.guided_x0.guided_x0`, (B, ...)."""
    x_t, positive, negative = alike(x_t, positive, positive if negative is None else negative)
    x0 = torch.empty_like(x_t)
    length = x_t[0].numel()
    block, warps = launch(ELEMENTWISE, length)
    skip, out, per_sample = beside(skip, x_t), beside(out, x_t), isinstance(scale, Tensor)
    _kernel[triton.cdiv(length, block), len(x_t)](
        x_t,
        skip,
        out,
        positive,
        negative,
        beside(scale, x_t) if isinstance(scale, Tensor) else skip,
        1.0 if isinstance(scale, Tensor) else float(scale),
        x0,
        length,
        GUIDED=negative is not positive,
        PER_SAMPLE=per_sample,
        BLOCK=block,
        num_warps=warps,
    )
    return x0
