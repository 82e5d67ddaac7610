"""How kernels walk over samples: rows that lie alike in memory, and the fixed table of launches."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.kernels.dispatch import interpreted

#: Entries of one program, and its warps, where each is read once.
ELEMENTWISE = (1024, 4)
#: The same where one program walks along a whole row.
ROW = (4096, 8)
#: Programs that share a row, at most, so that few rows keep a device busy, too.
_PARTS = 128
#: The interpreter takes its time for each program, whatever its size.
_INTERPRETED = 1 << 16

_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


def launch(table: tuple[int, int], length: int) -> tuple[int, int]:
    """The block and the number of warps for rows of ``length`` entries."""
    block, warps = table
    if not interpreted():
        return block, warps
    return min(_INTERPRETED, 1 << max(length - 1, 1).bit_length()), warps


def slices(length: int, block: int) -> tuple[int, int]:
    """The number of programs that share a row of ``length`` entries, a power of two, and the entries of each."""
    parts = min(_PARTS, 1 << (max(length // block, 1).bit_length() - 1))
    return parts, -(-length // parts)


def alike(*samples: Tensor) -> list[Tensor]:
    """The samples (B, ...) with every row dense and in the same order of entries; copies where they are not."""
    first = samples[0]
    ordered = any(first.is_contiguous(memory_format=form) for form in _FORMATS if _has(form, first))
    if ordered and all(sample.stride() == first.stride() for sample in samples):
        return list(samples)
    return [sample.contiguous() for sample in samples]


def beside(coefficient: Tensor, sample: Tensor) -> Tensor:
    """A number for each row of the sample (B, ...), or one for all, as B dense numbers on its device."""
    return coefficient.to(sample.device).reshape(-1).expand(len(sample)).contiguous()


def _has(form: torch.memory_format, sample: Tensor) -> bool:
    return form == torch.contiguous_format or sample.dim() == {torch.channels_last: 4}.get(form, 5)
