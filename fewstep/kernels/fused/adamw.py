"""The update of one role as one launch over all of its tensors, see :mod:`fewstep.kernels.adamw`.

A program takes a block of one tensor. Which one, and from where on, stands in a list for each; where the tensors lie
stands in a table of addresses, 0 for what a parameter does not have. Both come to the device without a wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels.updates import Common, Row
from fewstep.sending import sent

#: Elements of a program, and its warps.
BLOCK, WARPS = 4096, 8
#: What Triton may assume of addresses that are multiples of so many bytes: that it can load four floats at once.
_ALIGNED = 16
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _address(table, row, count, which, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    return tl.multiple_of(tl.load(table + row * count + which).to(tl.pointer_type(TYPE)), ALIGNED)


@triton.jit
def _followed(e_at, p, offset, mask, weight, TYPE: tl.constexpr):
    e = tl.load(e_at + offset, mask=mask).to(tl.float32)
    tl.store(e_at + offset, (e + weight * (p - e)).to(TYPE), mask=mask)


@triton.jit
def _elements(
    table, count, which, offset, mask, scale, updates, step, root, kept, rate1, beta2, rate2, eps, weight0, weight1,
    AVERAGES: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    p_at = _address(table, 0, count, which, TYPE, ALIGNED)
    g_at = _address(table, 1, count, which, TYPE, ALIGNED)
    m_at = _address(table, 2, count, which, TYPE, ALIGNED)
    v_at = _address(table, 3, count, which, TYPE, ALIGNED)
    p = tl.load(p_at + offset, mask=mask).to(tl.float32)
    if updates & (g_at.to(tl.int64) != 0):
        g = tl.load(g_at + offset, mask=mask).to(tl.float32) * scale
        m = tl.load(m_at + offset, mask=mask).to(tl.float32)
        v = tl.load(v_at + offset, mask=mask).to(tl.float32)
        m += rate1 * (g - m)
        v = beta2 * v + rate2 * g * g
        p = (kept * p - step * m / (tl.sqrt(v) / root + eps)).to(TYPE).to(tl.float32)
        tl.store(m_at + offset, m.to(TYPE), mask=mask)
        tl.store(v_at + offset, v.to(TYPE), mask=mask)
        tl.store(p_at + offset, p.to(TYPE), mask=mask)
    if AVERAGES > 0:
        e_at = _address(table, 4, count, which, TYPE, ALIGNED)
        if e_at.to(tl.int64) != 0:
            _followed(e_at, p, offset, mask, weight0, TYPE)
    if AVERAGES > 1:
        f_at = _address(table, 5, count, which, TYPE, ALIGNED)
        if f_at.to(tl.int64) != 0:
            _followed(f_at, p, offset, mask, weight1, TYPE)


@triton.jit
def _update(
    table, count, owners, starts, sizes, scale_at, skip_at, steps, roots, kept, rate1, beta2, rate2, eps, weight0,
    weight1, AVERAGES: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    which = tl.load(owners + tl.program_id(0))
    start = tl.multiple_of(tl.load(starts + tl.program_id(0)), BLOCK)
    size, scale, updates = tl.load(sizes + which), tl.load(scale_at), tl.load(skip_at) == 0
    step, root = tl.load(steps + which), tl.load(roots + which)
    offset = start + tl.arange(0, BLOCK)
    # Without a mask four floats are loaded at once.
    if start + BLOCK <= size:
        _elements(
            table, count, which, offset, None, scale, updates, step, root, kept, rate1, beta2, rate2, eps, weight0,
            weight1, AVERAGES, TYPE, ALIGNED,
        )  # fmt: skip
    else:
        _elements(
            table, count, which, offset, offset < size, scale, updates, step, root, kept, rate1, beta2, rate2, eps,
            weight0, weight1, AVERAGES, TYPE, ALIGNED,
        )  # fmt: skip


def update(rows: Sequence[Row], common: Common) -> None:
    """As :func:`fewstep.kernels.adamw.closed`; all rows are of one dtype, each one's tensors alike in memory."""
    rule, device, dtype = common.rule, common.skip.device, rows[0].parameter.dtype
    corrections = [1 - beta ** common.counts.double() for beta in rule.betas]
    columns = [[row.parameter, row.gradient, *(row.momenta or (None, None)), *row.averages] for row in rows]
    addresses = [[0 if tensor is None else tensor.data_ptr() for tensor in column] for column in columns]
    owners, starts, sizes = _layout(tuple(row.parameter.numel() for row in rows), device)
    if not len(owners):
        return
    _update[(len(owners),)](
        sent([address for column in zip(*addresses, strict=True) for address in column], device, torch.int64),
        len(rows),
        owners,
        starts,
        sizes,
        torch.ones((), device=device) if common.scale is None else common.scale.float(),
        common.skip,
        (rule.lr / corrections[0]).float(),
        corrections[1].sqrt().float(),
        1 - rule.lr * rule.weight_decay,
        1 - rule.betas[0],
        rule.betas[1],
        1 - rule.betas[1],
        rule.eps,
        *[*common.weights, 0.0, 0.0][:2],
        AVERAGES=len(common.weights),
        TYPE=_TYPES[dtype],
        ALIGNED=_ALIGNED if all(a % _ALIGNED == 0 for column in addresses for a in column) else dtype.itemsize,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    torch.autograd.graph.increment_version([tensor for row in rows for tensor in row.averages if tensor is not None])


@lru_cache(maxsize=16)
def _layout(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each program its tensor and where in it it begins; and how large each tensor is."""
    blocks = [(which, start) for which, size in enumerate(sizes) for start in range(0, size, BLOCK)]
    owners, starts = ([block[k] for block in blocks] for k in (0, 1))
    return sent(owners, device, torch.int32), sent(starts, device, torch.int64), sent(sizes, device, torch.int64)
