"""Weights shaken for the length of a test: fresh networks have zero layers and closed gates that hide every mistake."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fewstep.recording.pipeline import is_plain


@contextlib.contextmanager
def shaken(*networks: nn.Module, relative: float = 0.3, least: float = 0.05, seed: int = 0) -> Iterator[None]:
    """Add noise to all weights of the networks inside the context, quantised ones apart.

    It is `relative` times each parameter's standard deviation, at least `least`. The parameters' own storage is set
    aside, not written to, so that afterwards it is back bit for bit.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for network in networks for p in network.parameters() if p.is_floating_point() and is_plain(p)]
    kept = [(parameter, parameter.data) for parameter in parameters]
    try:
        for parameter, data in kept:
            spread = data.float().std().item() if data.numel() > 1 else 0.0
            noise = torch.randn(data.shape, generator=generator) * max(relative * spread, least)
            parameter.data = data + noise.to(data)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
