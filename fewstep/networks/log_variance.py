"""The logarithm of a loss at each noise level, learnt beside a network, so that all weigh alike (sCM, App. D)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

#: The name of the added module in a role.
LOG_VARIANCE = "log_variance"


class LogVariance(nn.Module):
    """w of a noise level: sines and cosines of its logarithm, and one linear layer that starts at zero.

    Args:
        frequencies: number of them; the periods are spread evenly, by their logarithm, over 1 to 100.
    """

    rates: Tensor

    def __init__(self, frequencies: int = 32) -> None:
        super().__init__()
        periods = torch.logspace(0, 2, frequencies)
        self.register_buffer("rates", 2 * math.pi / periods)
        self.linear = nn.Linear(2 * frequencies, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, log_level: Tensor) -> Tensor:
        """w (B,) at ln(sigma / alpha) (B,)."""
        angles = log_level.to(self.linear.weight.dtype)[:, None] * self.rates
        said: Tensor = self.linear(torch.cat([angles.sin(), angles.cos()], 1)).squeeze(1)
        return said
