"""Pictures as the published extractors take them: three channels, resized by Pillow as their authors resized."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

#: Mean and standard deviation of ImageNet's channels, and those of CLIP's images.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def takes(shape: tuple[int, ...]) -> bool:
    """Whether images of this shape (C, H, W) are grey or RGB, of any size."""
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape) > 0


def as_rgb(images: Tensor) -> Tensor:
    """uint8 (N, 1 or 3, H, W) -> uint8 (N, 3, H, W); grey three times.

    Raises:
        ValueError: another dtype or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or not takes(tuple(images.shape[1:])):
        raise ValueError(f"expected uint8 images (N, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}")
    return images.expand(-1, 3, -1, -1)


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 (N, 3, size, size) of whole numbers: Pillow's bicubic filter, with antialias."""
    sizes = (size, size)
    return _each(images, lambda picture: np.asarray(Image.fromarray(picture).resize(sizes, Image.Resampling.BICUBIC)))


def resized_in_float(images: Tensor, size: int) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 (N, 3, size, size) in [0, 255]: the same filter, each channel in floating point.

    The resize of Parmar et al. 2022 (arXiv 2104.11222): nothing is rounded to whole numbers on the way.
    """

    def channel(values: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(values.astype(np.float32))
        return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 255)

    return _each(images, lambda picture: np.stack([channel(picture[..., i]) for i in range(3)], axis=-1))


def centre_square(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, S, S) with S = min(H, W): the middle; of an odd rest the larger part is cut at the end."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def standardised(images: Tensor, statistics: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """float (N, 3, H, W) in [0, 255] -> (x / 255 - mean) / std by channel."""
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in statistics)
    return (images / 255 - mean) / std


def _each(images: Tensor, change: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """``change`` of each picture (H, W, 3) -> (H', W', 3), as float32 (N, 3, H', W') on the CPU."""
    pictures = images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
    changed = np.stack([change(picture) for picture in pictures]).astype(np.float32)
    return torch.from_numpy(changed).permute(0, 3, 1, 2).contiguous()
