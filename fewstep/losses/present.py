"""Losses of sparse samples: objects of unequally many entries, padded to one size, with a mask of those that are there.

A mask is (B, N) for samples (B, N, ...), or has as many axes as a sample; without one all entries are there.
"""

from __future__ import annotations

from torch import Tensor

from fewstep.losses.consistency import distance


def of_present(x: Tensor, present: Tensor | None) -> Tensor:
    """``x`` (B, ...), 0 where nothing is."""
    return x if present is None else x * _wide(present, x).to(x)


def present_entries(x: Tensor, present: Tensor | None) -> Tensor | None:
    """How many numbers each of the samples ``x`` (B, ...) has, (B,); None where all have as many.

    Raises:
        ValueError: a sample without any.
    """
    if present is None:
        return None
    entries = _wide(present, x).expand_as(x).flatten(1).sum(1)
    if entries.device.type == "cpu" and not bool(entries.all()):  # elsewhere the host would have to wait
        raise ValueError("a sample of the batch has no entries: its mask says that nothing is there")
    return entries


def mean_over_present(kind: str, a: Tensor, b: Tensor, present: Tensor | None) -> Tensor:
    """The :func:`fewstep.losses.consistency.distance` of ``a`` and ``b`` (B, ...) where something is, (B,).

    Of those that are means over a sample (mse, l1, pseudo_huber_elementwise), the mean of the batch is that over all
    its entries, so that a voxel weighs as much in a large object as in a small one.
    """
    each = distance(kind, of_present(a, present), of_present(b, present))
    entries = present_entries(a, present)
    if entries is None or kind not in ("mse", "l1", "pseudo_huber_elementwise"):
        return each
    return each * (a.numel() / entries.sum())


def _wide(present: Tensor, x: Tensor) -> Tensor:
    """The mask with the axes of ``x``."""
    return present.bool().reshape(*present.shape, *[1] * (x.dim() - present.dim()))
