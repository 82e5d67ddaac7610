"""Numbers of the host on a device, without a wait of the host for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sent(
    values: Sequence[float] | Sequence[int] | Sequence[bool], device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """The numbers (N,) on ``device``.

    ``torch.tensor(values, device=device)`` waits until the device has done all that it was told before.
    """
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
