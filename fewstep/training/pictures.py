"""Pictures of samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.data.durable import write_durably


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [0, 1], any shape, as uint8: rounded half up and clipped."""
    return (images.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def frames_of(images: Tensor) -> Tensor:
    """Videos (B, C, F, H, W) as (B, C, H, F * W), frames side by side; images stay as they are."""
    if images.dim() == 4:
        return images
    batch, channels, frames, height, width = images.shape
    return images.permute(0, 1, 3, 2, 4).reshape(batch, channels, height, frames * width)


def on_white(images: Sequence[Tensor]) -> Tensor:
    """Images (B, C, H, W), or videos, of several sizes as one tensor, the smaller ones on white, to the upper left.

    They are floats in [0, 1], or uint8.
    """
    height, width = (max(one.shape[axis] for one in images) for axis in (-2, -1))
    sides = [(0, width - one.shape[-1], 0, height - one.shape[-2]) for one in images]
    white, pad = 1.0 if images[0].is_floating_point() else 255, torch.nn.functional.pad
    return torch.cat([pad(one, side, value=white) for one, side in zip(images, sides, strict=True)])


def in_size(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Images, or videos, (B, ..., H, W) resampled to a height and width; None leaves them as they are.

    They are floats in [0, 1], or uint8.
    """
    if size is None or tuple(images.shape[-2:]) == size:
        return images
    flat = images.reshape(len(images), -1, *images.shape[-2:]).float()
    made = torch.nn.functional.interpolate(flat, size, mode="bilinear", antialias=True)
    made = made if images.is_floating_point() else to_uint8(made / 255)
    return made.reshape(*images.shape[:-2], *size)


def save_grid(rows: Sequence[Tensor], path: Path, pad: int = 2) -> None:
    """Write a PNG in which each row shows the images (B, C, H, W), or videos, of one tensor in [0, 1]."""
    strips = [torch.cat([torch.nn.functional.pad(i, [pad] * 4, value=1.0) for i in frames_of(row)], 2) for row in rows]
    pixels = to_uint8(torch.cat(strips, 1)).cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2))
    scale = max(1, round(64 / rows[0].shape[-1]))  # pictures of 32 pixels are hard to judge on a screen
    larger = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    write_durably(path, lambda unfinished: larger.save(unfinished, format="PNG"))
