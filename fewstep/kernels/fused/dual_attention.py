"""The kernel of :mod:`fewstep.kernels.dual_attention`: online softmax with three accumulators.

One program has some queries of one head and walks along the keys. Beside the sum of the exponentials it carries those
of p v, of (p ds) v + p dv, and of p ds, all relative to the largest score so far.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels.attention_pieces import Attended, Inputs, Options
from fewstep.kernels.dispatch import interpreted

#: The width of a head, rounded up to a power of two -> queries and keys of one tile, and warps.
TILES = {16: (64, 64, 4), 32: (64, 64, 4), 64: (64, 32, 4), 128: (64, 32, 8), 256: (32, 16, 8)}
#: The interpreter takes its time for each tile, whatever its size.
_INTERPRETED = (64, 64, 4)


@triton.jit
def _kernel(
    q, k, v, dq, dk, dv, mask, o, lse, do, dlse,
    heads, queries, keys, width, value_width, scale, of_batch, of_head, of_query, of_key,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DUAL: tl.constexpr,
    DQ: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    column, value_column = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    in_row, in_column, in_value = row < queries, column < width, value_column < value_width
    at_query = (head * queries + row)[:, None] * width + column[None, :]
    at_output = (head * queries + row)[:, None] * value_width + value_column[None, :]
    is_query, is_output = in_row[:, None] & in_column[None, :], in_row[:, None] & in_value[None, :]
    at_mask = mask + (head // heads) * of_batch + (head % heads) * of_head + row.to(tl.int64)[:, None] * of_query

    query = scale * tl.load(q + at_query, mask=is_query, other=0.0).to(tl.float32)
    if DQ:
        query_change = scale * tl.load(dq + at_query, mask=is_query, other=0.0).to(tl.float32)
    top = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sum_o = tl.zeros([QUERIES, VALUE_WIDTH], tl.float32)
    sum_do = tl.zeros([QUERIES, VALUE_WIDTH], tl.float32)
    sum_dlse = tl.zeros([QUERIES], tl.float32)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (tl.program_id(0) + 1) * QUERIES)
    for start in range(0, end, KEYS):
        other = start + tl.arange(0, KEYS)
        in_other = other < keys
        at_key = (head * keys + other)[:, None] * width + column[None, :]
        at_value = (head * keys + other)[:, None] * value_width + value_column[None, :]
        is_key, is_value = in_other[:, None] & in_column[None, :], in_other[:, None] & in_value[None, :]
        key = tl.load(k + at_key, mask=is_key, other=0.0).to(tl.float32)
        value = tl.load(v + at_value, mask=is_value, other=0.0).to(tl.float32)

        s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        seen = in_other[None, :]
        if CAUSAL:
            seen = seen & (other[None, :] <= row[:, None])
        if MASK != 0:
            inside = in_row[:, None] & in_other[None, :]
            told = tl.load(at_mask + other[None, :] * of_key, mask=inside, other=0)
            if MASK == 1:
                seen = seen & (told != 0)
            else:
                s += told.to(tl.float32)
        s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        # Where nothing was seen so far, exp(-inf - 0) is the zero that exp(-inf + inf) is not.
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        fade = tl.exp(top - finite)
        p = tl.exp(s - finite[:, None])
        top = higher
        total = total * fade + tl.sum(p, 1)
        sum_o = sum_o * fade[:, None] + tl.dot(p, value, input_precision=PRECISION)
        if DUAL:
            sum_do = sum_do * fade[:, None]
            if DV:
                value_change = tl.load(dv + at_value, mask=is_value, other=0.0).to(tl.float32)
                sum_do += tl.dot(p, value_change, input_precision=PRECISION)
            if DQ or DK:
                ds = tl.zeros([QUERIES, KEYS], tl.float32)
                if DQ:
                    ds += tl.dot(query_change, tl.trans(key), input_precision=PRECISION)
                if DK:
                    key_change = tl.load(dk + at_key, mask=is_key, other=0.0).to(tl.float32)
                    ds += tl.dot(query, tl.trans(key_change), input_precision=PRECISION)
                ds = p * ds
                sum_do += tl.dot(ds, value, input_precision=PRECISION)
                sum_dlse = sum_dlse * fade + tl.sum(ds, 1)

    safe = tl.where(total == 0.0, 1.0, total)
    output = sum_o / safe[:, None]
    tl.store(o + at_output, output.to(o.dtype.element_ty), mask=is_output)
    said = tl.where(total == 0.0, -float("inf"), top + tl.log(safe))
    tl.store(lse + head * queries + row, said, mask=in_row)
    if DUAL:
        change = sum_dlse / safe
        change_of_output = sum_do / safe[:, None] - change[:, None] * output
        tl.store(do + at_output, change_of_output.to(do.dtype.element_ty), mask=is_output)
        tl.store(dlse + head * queries + row, change, mask=in_row)


def attend(inputs: Inputs, options: Options) -> Attended:
    """As :func:`fewstep.kernels.attention_pieces.attend`, of float32 or less."""
    q, k, v, dq, dk, dv = (None if x is None else x.contiguous() for x in inputs[:6])
    assert q is not None and k is not None and v is not None
    *lead, queries, width = q.shape
    keys, value_width = v.shape[-2:]
    o, lse = q.new_empty(*lead, queries, value_width), q.new_empty(*lead, queries, dtype=torch.float32)
    do, dlse = (torch.empty_like(o), torch.empty_like(lse)) if inputs.change else (None, None)
    mask, kind = _mask(inputs.mask, lead, queries, keys, q.device)
    tile, value_tile = (max(16, triton.next_power_of_2(size)) for size in (width, value_width))
    rows, columns, warps = _INTERPRETED if interpreted() else TILES[max(tile, value_tile)]
    _kernel[(triton.cdiv(queries, rows), math.prod(lead))](
        q, k, v, *(q if x is None else x for x in (dq, dk, dv)), mask,
        o, lse, o if do is None else do, lse if dlse is None else dlse,
        lead[-1] if lead else 1, queries, keys, width, value_width, options.scale, *mask.stride(),
        MASK=kind, CAUSAL=options.causal, DUAL=inputs.change,
        DQ=dq is not None, DK=dk is not None, DV=dv is not None,
        # Half precision has no more bits than TensorFloat32, but a wider float32 does.
        PRECISION="ieee" if torch.float32 in (q.dtype, k.dtype, v.dtype) else "tf32",
        QUERIES=rows, KEYS=columns, WIDTH=tile, VALUE_WIDTH=value_tile, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return Attended(o, lse, do, dlse)


def _mask(mask: Tensor | None, lead: list[int], queries: int, keys: int, device: torch.device) -> tuple[Tensor, int]:
    """The mask (batch, heads, Nq, Nk), uncopied where it is broadcast; 0: there is none, 1: truth values, 2: added."""
    if mask is None:
        return torch.empty(1, 1, 1, 1, device=device), 0
    *batch, heads = lead or [1]
    mask = mask.expand(*lead, queries, keys).reshape(math.prod(batch), heads, queries, keys)
    return (mask.view(torch.uint8), 1) if mask.dtype == torch.bool else (mask, 2)
