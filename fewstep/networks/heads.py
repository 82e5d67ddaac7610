"""Real/fake heads on tapped features (Yin et al. 2024, DMD2, §4.3). Heads are small, the critic is deep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fewstep.errors import UserError


class ConvHead(nn.Module):
    """Feature maps (B, C, H, W) or (B, C, F, H, W) to logits (B,): convolutions to a side of 4, then pooling."""

    def __init__(self, channels: int, side: int, video: bool = False) -> None:
        super().__init__()
        convolution: Callable[..., nn.Module] = nn.Conv3d if video else nn.Conv2d
        kernel, stride, padding = ((1, 4, 4), (1, 2, 2), (0, 1, 1)) if video else (4, 2, 1)
        groups = math.gcd(32, channels)
        layers: list[nn.Module] = []
        while side > 4:
            layers += [convolution(channels, channels, kernel, stride, padding)]
            layers += [nn.GroupNorm(groups, channels), nn.SiLU()]
            side //= 2
        layers += [convolution(channels, channels, 1), nn.GroupNorm(groups, channels), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.logit = nn.Linear(channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B,), in the head's dtype."""
        return self.logit(self.body(features).flatten(2).mean(2)).squeeze(1)


class TokenHead(nn.Module):
    """Image tokens (B, N, C) to logits (B,): LayerNorm, a two-layer MLP, mean over the tokens."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.SiLU())
        self.logit = nn.Linear(channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B,), in the head's dtype."""
        return self.logit(self.body(features)).mean(1).squeeze(1)


class LevelHeads(nn.Module):
    """A head for each of several levels of features.

    Args:
        features: like those that it will see.
        seed: of the weights, the same on every process.
    """

    def __init__(self, features: Sequence[Tensor], seed: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(make_head(level, seed) for level in features)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, n) of n levels, in the heads' dtype."""
        return torch.stack([head(level) for head, level in zip(self.levels, features, strict=True)], 1)


def make_head(features: Tensor, seed: int) -> ConvHead | TokenHead:
    """A head for features like these, float32 on their device, with the same weights on every process.

    Raises:
        UserError: the features are neither maps nor tokens.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if features.dim() == 3:
            head: ConvHead | TokenHead = TokenHead(features.shape[2])
        elif features.dim() in (4, 5):
            head = ConvHead(features.shape[1], min(features.shape[-2:]), video=features.dim() == 5)
        else:
            raise UserError(f"features of shape {tuple(features.shape)} are neither maps nor tokens")
    return head.to(features.device)
