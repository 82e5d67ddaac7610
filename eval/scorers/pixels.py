"""Pictures as the published networks see them: resized by Pillow to the bit, cropped, scaled by mean and deviation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

# OpenAI's CLIP and all that follow it: mean and standard deviation of the three channels of pictures in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)

#: uint8 (N, 1 or 3, H, W) and a side -> float32 (N, 3, side, side), in [0, 1].
Resize = Callable[[Tensor, int], Tensor]


def normalised(pictures: Tensor) -> Tensor:
    """(x - mean) / deviation of each channel: float (N, 3, H, W) in [0, 1] -> the same shape."""
    mean, deviation = (pictures.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    return (pictures - mean) / deviation


def clip_pixels(pictures: Tensor, side: int) -> Tensor:
    """OpenAI's, open_clip's: the shorter side to ``side``, bicubic by Pillow; the centre, as torchvision cuts it.

    Args:
        pictures: uint8 (N, 1 or 3, H, W).

    Returns:
        float32 (N, 3, side, side), in [0, 1].
    """
    return _each(pictures, lambda image: _centre(_short_side(image, side), side, round_half=True))


def transformers_pixels(pictures: Tensor, side: int) -> Tensor:
    """As :func:`clip_pixels`, but the centre as transformers cuts it: a half margin is rounded down."""
    return _each(pictures, lambda image: _centre(_short_side(image, side), side, round_half=False))


def gigagan_pixels(pictures: Tensor, side: int) -> Tensor:
    """GigaGAN's and DMD2's for COCO: the centre square to 256 by Lanczos' filter, then :func:`clip_pixels`."""

    def square(image: Image.Image) -> Image.Image:
        small = _centre(image, min(image.size), round_half=True).resize((256, 256), Image.Resampling.LANCZOS)
        return _centre(_short_side(small, side), side, round_half=True)

    return _each(pictures, square)


def padded_pixels(pictures: Tensor, side: int) -> Tensor:
    """HPSv2's: the longer side to ``side``, and black beside what is shorter.

    It resizes scaled tensors and not pictures, bicubic and with antialiasing, as torchvision does since 0.17. Before,
    and perhaps for the published table, torchvision left the antialiasing out; numbers of the two differ.
    """
    height, width = pictures.shape[-2:]
    scale = side / max(height, width)
    new_height, new_width = max(round(height * scale), 1), max(round(width * scale), 1)
    scaled = pictures.float() / 255
    if (new_height, new_width) != (height, width):
        scaled = interpolate(scaled, (new_height, new_width), mode="bicubic", align_corners=False, antialias=True)
    above, left = (side - new_height) // 2, (side - new_width) // 2
    framed = pad(scaled, (left, side - new_width - left, above, side - new_height - above))
    return framed.expand(-1, 3, -1, -1)


def differentiable_pixels(pictures: Tensor, side: int, *, padded: bool = False) -> Tensor:
    """Pictures at a network's size with gradient: bicubic with antialiasing, not rounded to 256 values on the way.

    Args:
        pictures: float (N, 1 or 3, H, W) in [0, 1]; what is beyond is clipped, and has no gradient.
        side: of the network's pictures.
        padded: as :func:`padded_pixels`, else as :func:`clip_pixels`, also in the place of :func:`gigagan_pixels`.

    Returns:
        float32 (N, 3, side, side), within rounding that of the function whose place it takes.
    """
    height, width = pictures.shape[-2:]
    scale = side / (max(height, width) if padded else min(height, width))
    size = tuple(max(round(n * scale) if padded else int(n * scale + 1e-6), 1) for n in (height, width))
    seen = pictures.float().clamp(0, 1)
    if size != (height, width):
        seen = interpolate(seen, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    if padded:
        above, left = ((side - n) // 2 for n in size)
        return pad(seen, (left, side - size[1] - left, above, side - size[0] - above)).expand(-1, 3, -1, -1)
    above, left = (round((n - side) / 2) for n in size)
    return seen[..., above : above + side, left : left + side].expand(-1, 3, -1, -1)


def _each(pictures: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Each picture changed as an RGB image of Pillow; float32 in [0, 1], on the device it was on."""
    arrays = [
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
        for image in (change(_as_image(picture)) for picture in pictures.cpu())
    ]
    return torch.stack(arrays).permute(0, 3, 1, 2).to(pictures.device).float() / 255


def _as_image(picture: Tensor) -> Image.Image:
    """uint8 (1 or 3, H, W) as an RGB image; grey becomes three equal channels."""
    return Image.fromarray(picture.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def _short_side(image: Image.Image, side: int) -> Image.Image:
    """Its shorter side becomes ``side``; the longer one is rounded down."""
    short, long = min(image.size), max(image.size)
    if short == side:
        return image
    longer = int(side * long / short)
    size = (side, longer) if image.width <= image.height else (longer, side)
    return image.resize(size, Image.Resampling.BICUBIC)


def _centre(image: Image.Image, side: int, *, round_half: bool) -> Image.Image:
    """The square in its centre. round_half: a half margin is rounded to even, as torchvision does, not down."""
    margins = ((image.width - side) / 2, (image.height - side) / 2)
    left, top = (round(margin) if round_half else int(margin) for margin in margins)
    return image.crop((left, top, left + side, top + side))
