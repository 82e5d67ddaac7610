"""Real images and what they show, for GAN terms and for training from data."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fewstep.errors import UserError

_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


@dataclass(frozen=True)
class RealImages:
    """Real images and what each shows.

    Attributes:
        files: paths, or a uint8 tensor (N, C, H, W).
        captions: a text or a label for each, None where the data says nothing.
    """

    files: list[Path] | Tensor
    captions: list[str] | list[int] | None

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int, channels: int, height: int, width: int) -> Tensor:
        """Float (C, H, W) in [0, 1]: scaled until it covers the size, then cropped at the centre."""
        if isinstance(self.files, Tensor):
            pixels = self.files[index]
            picture = Image.fromarray(
                pixels.squeeze(0).numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
            )
        else:
            try:
                picture = Image.open(self.files[index])
                picture.load()
            # Pillow says SyntaxError and ValueError of some damaged files.
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise UserError(
                    f"{self.files[index]} is not an image that can be read; remove it from --data"
                ) from error
        picture = upright(picture).convert("L" if channels == 1 else "RGB")
        if picture.size != (width, height):
            scale = max(width / picture.width, height / picture.height)
            size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
            picture = picture.resize(size, Image.Resampling.LANCZOS)
            left, top = (picture.width - width) // 2, (picture.height - height) // 2
            picture = picture.crop((left, top, left + width, top + height))
        array = torch.from_numpy(np.array(picture)).float() / 255
        return array.reshape(height, width, channels).permute(2, 0, 1)


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


def read_images(source: str) -> RealImages:
    """Real images from ``--data``.

    A folder with a ``metadata.jsonl`` (``file_name`` and ``text`` or ``label``), with class sub-folders, with idx files
    (MNIST's format, 28 x 28 padded to 32 x 32), or the word ``fashion`` for the images shipped with the package.

    Raises:
        UserError: the folder is missing, empty, or of none of these forms.
    """
    if source == "fashion":
        from fewstep.fashion import training_images  # data of 3 MB, read only when asked for

        images, labels = training_images()
        return RealImages(images, labels.tolist())
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"--data {source} is not a folder")
    if (folder / "metadata.jsonl").is_file():
        return _from_metadata(folder)
    if idx_files := sorted(folder.glob("train-images-idx3-ubyte*")):
        return _from_idx(idx_files[0])
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [(file, path.name) for path in classes for file in _image_files(path)]
    if found:
        names = [name for _, name in found]
        # Folders called 0, 1, ..., 10 are labels: their alphabetical order (0, 1, 10, 2) would exchange classes.
        captions: list[Any] = [int(name) for name in names] if all(map(str.isdecimal, names)) else names
        return RealImages([file for file, _ in found], captions)
    if files := _image_files(folder):
        return RealImages(files, None)
    raise UserError(
        f"--data {source} holds no images ({', '.join(sorted(_IMAGE_SUFFIXES))}), no metadata.jsonl, no idx files"
    )


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in _IMAGE_SUFFIXES)


def _from_metadata(folder: Path) -> RealImages:
    source = folder / "metadata.jsonl"
    try:
        # Not splitlines: a caption may hold the other characters that it takes for the end of a line.
        lines = source.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text") from error
    if lines == [""]:
        raise UserError(f"{source} is empty")
    files: list[Path] = []
    captions: list[Any] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            files.append(folder / row["file_name"])
            captions.append(row["text"] if "text" in row else int(row["label"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{source}, line {number}: wants file_name and text or label") from error
        if not isinstance(captions[-1], str if "text" in row else int):
            raise UserError(f"{source}, line {number}: the text must be a string, not {captions[-1]!r}")
        if type(captions[-1]) is not type(captions[0]):
            raise UserError(f"{source}, line {number}: give every image a text, or every image a label")
        if not files[-1].is_file():
            raise UserError(f"{source}, line {number}: there is no file {files[-1]}")
    return RealImages(files, captions)


def _from_idx(images: Path) -> RealImages:
    labels = images.with_name(images.name.replace("images-idx3", "labels-idx1"))
    try:
        pixels, classes = read_idx(images), read_idx(labels)
    except (OSError, EOFError, struct.error, zlib.error, ValueError) as error:
        raise UserError(f"the idx files beside {images} cannot be read: {error}") from error
    if pixels.dim() != 3 or classes.shape != pixels.shape[:1]:
        raise UserError(
            f"{images} and {labels.name} do not belong together: {list(pixels.shape)}, {list(classes.shape)}"
        )
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2)) if pixels.shape[1:] == (28, 28) else pixels
    return RealImages(padded.unsqueeze(1), classes.tolist())


def read_idx(path: Path) -> Tensor:
    """A uint8 tensor from a (gzipped) file in MNIST's idx format."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        kind, rank = struct.unpack(">HBB", file.read(4))[1:]
        shape = struct.unpack(f">{rank}I", file.read(4 * rank))
        data = file.read()
    if kind != 8 or len(data) != int(np.prod(shape)):
        raise ValueError(f"{path} is not an idx file of bytes, or is truncated")
    return torch.from_numpy(np.frombuffer(data, np.uint8).reshape(shape).copy())
