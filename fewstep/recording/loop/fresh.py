"""Fresh noise in the place of the sample that a scheduler returns: what follows it is the sample, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def fresh_samples(seed: int) -> Callable[[int, Tensor], Tensor]:
    """What :func:`fewstep.recording.watch.observe.observe` takes as `replace`: another unit noise at every step.

    It has the spread of the scheduler's own sample, so that the network sees inputs of the size it would see.
    """
    generator = torch.Generator().manual_seed(seed)

    def fresh(_index: int, sample: Tensor) -> Tensor:
        spread = sample.float().std().nan_to_num(1.0).clamp(min=1e-3)
        return (torch.randn(sample.shape, generator=generator) * spread.cpu()).to(sample)

    return fresh
