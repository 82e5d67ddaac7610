"""What some pipelines do to their guided sum: it is brought to the size that the positive answer has.

A sum that leads far from the negative answer is larger than any answer of the network, and pictures of it are too
contrasted (Lin et al. 2023, arXiv 2305.08891, section 3.4). Three forms are met in pipelines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

#: The forms; in words, what the sum is given.
KINDS = {
    "tokens": "brought to the positive's norm over one axis",
    "whole": "shrunk to the positive's norm",
    "deviation": "brought to the positive's standard deviation",
}


@dataclass(frozen=True)
class Rescaling:
    """A guided sum, brought to the size of the positive answer.

    Attributes:
        kind: ``"tokens"`` (the norm over one axis), ``"whole"`` (the norm over all of a sample, never made larger) or
            ``"deviation"`` (the standard deviation over all of a sample).
        share: how much of the outcome is that, and how much the sum as it was.
        axis: of ``"tokens"``, counted from the last: that of the channels, which is the last one where a sample is
            packed into tokens.
    """

    kind: str
    share: float = 1.0
    axis: int = -1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a guided sum is rescaled by {', '.join(KINDS)}, not {self.kind!r}")

    def __call__(self, guided: Tensor, positive: Tensor) -> Tensor:
        """The sum, rescaled, each sample by itself; ``guided``, ``positive``: (B, ...), answers of a network."""
        factor = self.factor(guided, positive)
        if self.share != 1.0:
            factor = 1 + self.share * (factor - 1)
        return guided * factor.to(guided.dtype)

    def factor(self, guided: Tensor, positive: Tensor) -> Tensor:
        """What a share of 1 multiplies the sum with: it has an axis of 1 where the size is taken over."""
        wide = torch.promote_types(guided.dtype, torch.float32)
        guided, positive = guided.to(wide), positive.to(wide)
        if self.kind == "tokens":
            norms = (vector_norm(answer, dim=self.axis, keepdim=True) for answer in (positive, guided))
            return torch.div(*norms)
        over = tuple(range(1, guided.dim()))
        if self.kind == "whole":
            return (vector_norm(positive, dim=over, keepdim=True) / vector_norm(guided, dim=over, keepdim=True)).clamp(
                max=1
            )
        return positive.std(dim=over, keepdim=True) / guided.std(dim=over, keepdim=True)

    def describe(self) -> str:
        """In words."""
        words = KINDS[self.kind].replace("one axis", "the last axis" if self.axis == -1 else f"axis {self.axis}")
        return words + ("" if self.share == 1.0 else f" by a share of {self.share:.3g}")
