"""Opening an image, wherever it lies: the one place in which a file's bytes become a picture."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fewstep.errors import one_line

#: What Pillow says of damaged files, and the system of files that it does not give.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class Stored(Protocol):
    """An image inside a larger file; as a text it is the file's name and its own."""

    def read(self) -> bytes:
        """Its bytes. Raises :class:`OSError` where the file does not give them."""
        ...


@contextmanager
def opened(image: Path | Stored, *, pixels: bool = True) -> Iterator[Image.Image]:
    """An image with all its pixels read, or with its header alone.

    Raises:
        OSError: and others of :data:`UNREADABLE`, where it is none.
    """
    with Image.open(image if isinstance(image, Path) else io.BytesIO(image.read())) as picture:
        if pixels:
            picture.load()
        yield picture


def why_unreadable(image: Path | Stored) -> str:
    """The name of what is no image and the reason; empty for an image."""
    try:
        with opened(image) as picture:
            upright(picture)
    except UNREADABLE as error:
        return f"{image} ({one_line(error)[:100]})"
    return ""


def upright(picture: Image.Image) -> Image.Image:
    """A picture as it is meant to be seen: turned as its camera says, transparency on white, 16 bits of grey as 8."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture).astype(np.uint16) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture)
    return picture


def fitted(picture: Image.Image, channels: int, height: int, width: int) -> Tensor:
    """uint8 (C, H, W): scaled until it covers the size, then cropped at the centre."""
    picture = picture.convert("L" if channels == 1 else "RGB")
    if picture.size != (width, height):
        scale = max(width / picture.width, height / picture.height)
        size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        picture = picture.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(picture)).reshape(height, width, channels).permute(2, 0, 1)
