"""The kernel of :mod:`fewstep.kernels.renoise`: every entry is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels.fused.rows import ELEMENTWISE, alike, beside, launch


@triton.jit
def _kernel(x0, noise, alpha, sigma, x_t, length, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    at = row * length + at
    a = tl.load(alpha + row).to(tl.float32)
    s = tl.load(sigma + row).to(tl.float32)
    signal = tl.load(x0 + at, mask=inside, other=0.0).to(tl.float32)
    unit = tl.load(noise + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_t + at, (a * signal + s * unit).to(x_t.dtype.element_ty), mask=inside)


def renoise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`fewstep.kernels.renoise.renoise`, (B, ...), in ``dtype``."""
    x0, noise = alike(x0, noise)
    x_t = torch.empty_like(x0, dtype=dtype)
    length = x0[0].numel()
    block, warps = launch(ELEMENTWISE, length)
    grid = (triton.cdiv(length, block), len(x0))
    _kernel[grid](x0, noise, beside(alpha, x0), beside(sigma, x0), x_t, length, BLOCK=block, num_warps=warps)
    return x_t
