"""Attention in pieces: the closed form of :mod:`fewstep.kernels.dual_attention`, of memory that grows with N, not N^2.

exp(s - max) takes the place of p, and the sum it is divided by comes last, as in online softmax, so that a row of
scores is read a few times and kept by nobody. The backward pass makes the scores again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

#: Two matrices of scores live at a time. Where both are larger than this they are made in pieces that are not: of the
#: batch and the heads first, then of the queries. A CPU is fastest where a piece stays in its cache.
PIECE_BYTES = {"cpu": 8 * 2**20}
_PIECE_BYTES_ELSEWHERE = 256 * 2**20

Piece = tuple[slice, ...]


class Inputs(NamedTuple):
    """What attention is of, all of the same leading dimensions.

    Attributes:
        q: queries (..., Nq, D).
        k: keys (..., Nk, D).
        v: values (..., Nk, Dv).
        dq: how ``q`` changes; None where it does not.
        dk: how ``k`` changes.
        dv: how ``v`` changes.
        mask: of as many dimensions, broadcasts to (..., Nq, Nk): true where a query looks at a key, or what is added.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    mask: Tensor | None

    @property
    def change(self) -> bool:
        """Whether a tangent is asked for."""
        return not (self.dq is None and self.dk is None and self.dv is None)


class Options(NamedTuple):
    """How scores are made.

    Attributes:
        causal: query i looks at keys 0 to i.
        scale: of the product of queries and keys.
    """

    causal: bool
    scale: float


class Attended(NamedTuple):
    """What attention says.

    Attributes:
        o: (..., Nq, Dv), in the dtype of the queries.
        lse: log of the sum of the exponentials of each row of scores (..., Nq), float32, or float64 for float64.
        do: the tangent of ``o``; None where nothing changes.
        dlse: that of ``lse``.
    """

    o: Tensor
    lse: Tensor
    do: Tensor | None = None
    dlse: Tensor | None = None


def working(x: Tensor) -> Tensor:
    """In the dtype that is computed in: float64 stays, truth values too."""
    return x if x.dtype in (torch.float64, torch.bool) else x.float()


def pieces_of(q: Tensor, k: Tensor) -> list[Piece]:
    """Which parts of the leading dimensions and the queries are looked at together; one where all of them fit."""
    *lead, rows, _ = q.shape
    row = 2 * k.shape[-2] * (8 if q.dtype == torch.float64 else 4)
    return list(_cut(lead, rows, row, PIECE_BYTES.get(q.device.type, _PIECE_BYTES_ELSEWHERE)))


def _cut(lead: list[int], rows: int, row_bytes: int, limit: int) -> Iterator[Piece]:
    if not lead:
        count = max(1, limit // row_bytes)
        yield from ((slice(start, start + count),) for start in range(0, rows, count))
        return
    each = math.prod(lead[1:]) * rows * row_bytes
    count = max(1, limit // each)
    for start in range(0, lead[0], count):
        rest = [(slice(None),) * (len(lead) - 1) + (slice(0, rows),)] if each <= limit else None
        for inner in rest or _cut(lead[1:], rows, row_bytes, limit):
            yield (slice(start, start + count), *inner)


def attend(inputs: Inputs, options: Options) -> Attended:
    """What attention says, and its tangent where there is one to be had; without a graph."""
    q, k, v, dq, dk, dv = (None if x is None else working(x) for x in inputs[:6])
    assert q is not None and k is not None and v is not None
    q = options.scale * q
    width = v.shape[-1]
    o, lse = q.new_empty(*q.shape[:-1], width), q.new_empty(q.shape[:-1])
    do, dlse = (torch.zeros_like(o), torch.zeros_like(lse)) if inputs.change else (None, None)
    # dq k^T + q dk^T is one product of twice the depth; p v and p dv are one of twice the width.
    terms = [term for term in ((None if dq is None else options.scale * dq, k), (q, dk)) if None not in term]
    left, right = (torch.cat(part, -1) for part in zip(*terms, strict=True)) if terms else (None, None)
    values = v if dv is None else torch.cat([v, dv], -1)
    for piece in pieces_of(inputs.q, inputs.k):
        lead = piece[:-1]
        p = _scores(q, k, inputs.mask, options, piece)
        top = p.amax(-1, keepdim=True)
        top.masked_fill_(top == -math.inf, 0.0)
        total = p.sub_(top).exp_().sum(-1, keepdim=True)
        lse[piece] = (top + total.log()).squeeze(-1)
        total.masked_fill_(total == 0, 1.0)
        both = (p @ values[lead]).div_(total)
        o[piece] = both[..., :width]
        if do is None or dlse is None:
            continue
        if dv is not None:
            do[piece] = both[..., width:]
        if left is not None and right is not None:
            ds = (left[piece] @ right[lead].mT).mul_(p)
            change = ds.sum(-1, keepdim=True).div_(total)
            do[piece] += (ds @ v[lead]).div_(total).sub_(change * o[piece])
            dlse[piece] = change.squeeze(-1)
    dtype = inputs.q.dtype
    return Attended(o.to(dtype), lse, None if do is None else do.to(dtype), dlse)


def attend_backward(
    inputs: Inputs, options: Options, lse: Tensor, of_o: Tensor, of_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values.

    Args:
        inputs: of the forward pass.
        options: of it.
        lse: what came of it.
        of_o: the gradient of ``o``.
        of_lse: that of ``lse``; None where it is not used.
    """
    q, k, v, of_o = (working(x) for x in (*inputs[:3], of_o))
    of_q, of_k, of_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    q = options.scale * q
    # p is at most 1 where its row has anything to look at, and exp(-inf) where not.
    shift = lse.masked_fill(lse == -math.inf, 0.0)[..., None]
    for piece in pieces_of(inputs.q, inputs.k):
        lead = piece[:-1]
        p = _scores(q, k, inputs.mask, options, piece).sub_(shift[piece]).exp_()
        of_v[lead] += p.mT @ of_o[piece]
        of_s = (of_o[piece] @ v[lead].mT).mul_(p)
        inner = of_s.sum(-1, keepdim=True)
        of_s.addcmul_(p, inner if of_lse is None else inner - of_lse[piece][..., None], value=-1)
        of_q[piece] = (of_s @ k[lead]).mul_(options.scale)
        of_k[lead] += of_s.mT @ q[piece]
    q_type, k_type, v_type = (x.dtype for x in inputs[:3])
    return of_q.to(q_type), of_k.to(k_type), of_v.to(v_type)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, options: Options, piece: Piece) -> Tensor:
    """Of some queries, which are scaled, with all keys."""
    s = q[piece] @ k[piece[:-1]].mT
    if options.causal:
        hidden = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu_(1 + piece[-1].start)
        s.masked_fill_(hidden, -math.inf)
    if mask is not None:
        part = mask[tuple(cut if size > 1 else slice(None) for cut, size in zip(piece, mask.shape, strict=False))]
        if part.dtype == torch.bool:
            s.masked_fill_(~part, -math.inf)
        else:
            s += part
    return s
