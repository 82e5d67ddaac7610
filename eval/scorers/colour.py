"""Saturation and contrast of each sample: what too strong a guidance, and training against a reward, drive up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fewstep.eval.features import to_grey
from fewstep.eval.scorers.scorer import Asked, each_sample

_AT_ONCE = 64  # pictures: bounds the memory, changes no number


class ColourScorer:
    """Saturation and contrast of each picture, to be read beside the teacher's; of a video, the mean over frames.

    Saturation: mean over the pixels of HSV's (max - min) / max of the three channels, 0 where max is 0; in [0, 1], 0
    for a grey picture. Contrast: standard deviation (of the population) over the pixels of the luma 0.299 R + 0.587 G
    + 0.114 B, which lies in [0, 1]; so at most 0.5.
    """

    name = "HSV saturation; standard deviation of luma"
    names: tuple[str, ...] = ("saturation", "contrast")
    sha256: str | None = None
    verified = True
    looks_at: Literal["images", "videos"] = "images"

    def __call__(self, images: Tensor, asked: Asked = None) -> Mapping[str, Tensor]:
        """uint8 (N, [F,] 1 or 3, H, W) -> saturation and contrast, float64 (N,). Raises ValueError for other images."""
        return {
            "saturation": each_sample(images, lambda part, _: saturation(part), _AT_ONCE),
            "contrast": each_sample(images, lambda part, _: contrast(part), _AT_ONCE),
        }

    def note(self) -> str | None:
        return None


def saturation(pictures: Tensor) -> Tensor:
    """Mean saturation of each picture: uint8 (N, 1 or 3, H, W) -> float64 (N,)."""
    most, least = pictures.amax(dim=1).double(), pictures.amin(dim=1).double()
    # A black pixel has no saturation: 0 / 1.
    return ((most - least) / most.clamp(min=1)).mean(dim=(1, 2))


def contrast(pictures: Tensor) -> Tensor:
    """Standard deviation of each picture's luma: uint8 (N, 1 or 3, H, W) -> float64 (N,)."""
    return torch.std(to_grey(pictures).double(), dim=(1, 2, 3), correction=0)
