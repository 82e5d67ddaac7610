"""Pictures of items: looked at once, known by their content, and opened when they are asked for.

Eight hundred of them are never in memory together. The pipeline alone resizes: a picture is opened as diffusers itself
opens one, upright, in colour or, where it is a mask, in grey, and at its own size.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fewstep.data.image_opening import UNREADABLE, Stored, opened, upright_size
from fewstep.errors import UserError, one_line

_OPEN = 8  # that are kept decoded, as the same items are asked for again and again while they are recorded


@dataclass(frozen=True)
class Picture:
    """A picture in a file, which is opened when it is asked for.

    Attributes:
        source: where it lies.
        grey: whether it is a mask.
        sha256: of the file's bytes when it was looked at.
        size: width and height as it is meant to be seen.
        blank: whether all of it is black, as far as its pixels were looked at.
    """

    source: Path | Stored
    grey: bool
    sha256: str
    size: tuple[int, int]
    blank: bool

    def open(self) -> Image.Image:
        """The picture, upright, RGB or L.

        Raises:
            UserError: its file is not what was looked at.
        """
        return _opened(self)


#: A picture as it stands in an item that was read.
SHOWN = (Picture, Image.Image, Tensor, np.ndarray)


class Clip(list[Any]):
    """The frames of a clip, which came as a folder; any other list is of several references."""


@dataclass(frozen=True)
class _Bytes:
    """Bytes that were read already."""

    content: bytes

    def read(self) -> bytes:
        return self.content


def look_at(source: Path | Stored, grey: bool, *, pixels: bool = True) -> Picture:
    """Read a picture's file once, all of it.

    Args:
        source: where it lies.
        grey: whether it is a mask.
        pixels: look at them, too; else its bytes alone tell it from another, which costs a tenth of that.

    Raises:
        UserError: it is missing, no picture, damaged or an animation; the file is named.
    """
    try:
        content = source.read_bytes() if isinstance(source, Path) else source.read()
        with opened(_Bytes(content), pixels=pixels) as picture:
            if not pixels:
                return Picture(source, grey, hashlib.sha256(content).hexdigest(), _size_in_header(picture), False)
            # The second picture of a phone's photograph (MPO) is a preview of the first.
            if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
                raise UserError(f"{source} is an animation; a clip is a folder of frames, one picture each")
            meant = as_meant(picture, grey)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {source}") from error
    except UserError:
        raise
    except UNREADABLE as error:
        # Pillow names the object that it was given, which is another one each time.
        why = "of no known format" if isinstance(error, UnidentifiedImageError) else one_line(error)[:100]
        raise UserError(f"{source} is no picture that can be read ({why})") from error
    return Picture(source, grey, hashlib.sha256(content).hexdigest(), meant.size, is_blank(meant))


def _size_in_header(picture: Image.Image) -> tuple[int, int]:
    """As :func:`fewstep.data.image_opening.upright_size`, without what a PNG may say behind its pixels.

    To look for that, Pillow decodes them.
    """
    return picture.size if picture.format == "PNG" and "exif" not in picture.info else upright_size(picture)


def as_meant(picture: Image.Image, grey: bool) -> Image.Image:
    """A picture as diffusers' ``load_image`` gives it, RGB, or of that the grey for a mask.

    A student is shown what its stock pipeline will be shown of the same file: upright, and where it is transparent the
    colour beneath.

    Raises:
        ValueError: it has more than 8 bits, of which ``load_image`` keeps the lowest values and makes white of others.
    """
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"of the mode {picture.mode}, of which pipelines see the first 8 bits: save it with 8 bits")
    turned, mode = ImageOps.exif_transpose(picture), "L" if grey else "RGB"
    return turned if turned.mode == mode else turned.convert("RGB").convert(mode)


def is_blank(value: Image.Image | Tensor | np.ndarray) -> bool:
    """Whether all of a picture is black."""
    return value.getbbox() is None if isinstance(value, Image.Image) else not bool((value != 0).any())


def is_mask(argument: str) -> bool:
    """Whether an argument takes masks, which diffusers calls by that word and takes in grey, whatever a file holds."""
    return not {"mask", "masks"}.isdisjoint(argument.split("_"))


def flat(value: Any) -> Iterator[Any]:
    """What a value holds: of lists each entry, of anything else itself."""
    if isinstance(value, list):
        for child in value:
            yield from flat(child)
    else:
        yield value


@functools.lru_cache(_OPEN)
def _opened(picture: Picture) -> Image.Image:
    source = picture.source
    try:
        content = source.read_bytes() if isinstance(source, Path) else source.read()
        if hashlib.sha256(content).hexdigest() != picture.sha256:
            raise UserError(f"{source} has changed since the items were read; put it back, or start again")
        with opened(_Bytes(content)) as found:
            return as_meant(found, picture.grey)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{source} cannot be read any more: {one_line(error)}") from error
