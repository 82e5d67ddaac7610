"""Many short texts as two tensors: read one by one from a memory-mapped file, no list of them in memory."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, pairwise

import torch
from torch import Tensor


def pack(texts: Iterable[str]) -> tuple[Tensor, Tensor]:
    """Where each of N texts ends, int64 (N,), and all their bytes in UTF-8 in a row, uint8."""
    parts = [text.encode() for text in texts]
    ends = torch.tensor(list(accumulate(map(len, parts))), dtype=torch.int64)
    return ends, torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8) if any(parts) else ends[:0].byte()


def unpack(ends: Tensor, content: Tensor) -> list[str]:
    """All texts of :func:`pack`."""
    data, places = content.numpy().tobytes(), [0, *ends.tolist()]
    return [data[first:last].decode() for first, last in pairwise(places)]
