"""Opening an image, wherever it lies: the one place in which a file's bytes become a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from fewstep.errors import one_line

#: What Pillow says of damaged files, and the system of files that it does not give.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
#: What is opened, whatever a file is called. Pillow knows many more, and starts another program for some of them.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_LONGEST = 8  # an image whose sides differ by more is cut before it is scaled, which else would make it enormous


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
    with Image.open(image if isinstance(image, Path) else io.BytesIO(image.read()), formats=_FORMATS) as picture:
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
    """A picture as it is meant to be seen: turned as its camera says, transparency on white, 16 bits of grey as 8.

    Raises:
        ValueError: its numbers have no white: 32 bits, or fractions.
    """
    sixteen = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG")
    if picture.mode == "F" or (picture.mode.startswith("I") and not sixteen):
        raise ValueError(f"of the mode {picture.mode}, whose white is not known: save it with 8 or 16 bits")
    picture = ImageOps.exif_transpose(picture)
    if sixteen:
        return Image.fromarray((np.asarray(picture).astype(np.uint16) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture)
    return picture


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height of a picture as it is meant to be seen; its header is enough."""
    turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)  # by a quarter
    return (picture.height, picture.width) if turned else picture.size


def fitted(picture: Image.Image, channels: int, height: int, width: int) -> Tensor:
    """uint8 (C, H, W): scaled until it covers the size, then cropped at the centre."""
    picture = picture.convert("L" if channels == 1 else "RGB")
    if picture.size != (width, height):
        picture = _cut(picture, width / height)
        scale = max(width / picture.width, height / picture.height)
        size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        picture = picture.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(picture)).reshape(height, width, channels).permute(2, 0, 1)


def _cut(picture: Image.Image, aspect: float) -> Image.Image:
    """The middle of an image that is many times as long as what is wanted of it; any other as it is."""
    wide, high = picture.size
    longest = (math.ceil(high * aspect * _LONGEST), math.ceil(wide / aspect * _LONGEST))
    kept = min(wide, longest[0]), min(high, longest[1])
    left, top = (wide - kept[0]) // 2, (high - kept[1]) // 2
    return picture if kept == picture.size else picture.crop((left, top, left + kept[0], top + kept[1]))
