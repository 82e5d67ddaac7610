"""Real images and what they show, for GAN terms and for training from data."""

from __future__ import annotations

import gzip
import json
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from fewstep.data.contents import Contents, contents_of
from fewstep.data.durable import json_sha256
from fewstep.data.image_folders import SUFFIXES, find_images, passed_over_line, unlisted
from fewstep.data.image_opening import UNREADABLE, fitted, opened, upright, why_unreadable
from fewstep.errors import UserError

_AT_ONCE = 4096  # images that are handed to the readers together
_NAMED = 5  # of the files that cannot be read


@dataclass(frozen=True)
class RealImages:
    """Real images and what each shows.

    Attributes:
        files: paths, or a uint8 tensor (N, C, H, W).
        captions: a text or a label for each, None where the data says nothing.
        classes: the names of all class folders, in the order of their numbers; empty where there are none.
        sources: the files that they were read from, the images' own apart.
        passed_over: how many files of the folder are no data, and why: the end of a line for people, or empty.
    """

    files: list[Path] | Tensor
    captions: list[str] | list[int] | None
    classes: tuple[str, ...] = ()
    sources: tuple[Path, ...] = ()
    passed_over: str = ""

    def __len__(self) -> int:
        return len(self.files)

    def refuse_unreadable(self, progress: bool = False) -> None:
        """Read every image once, so that none stops a run in its middle.

        Raises:
            UserError: some cannot be read; they are named.
        """
        if isinstance(self.files, Tensor):
            return
        bad: list[str] = []
        with (
            ThreadPoolExecutor(os.cpu_count()) as readers,
            tqdm(total=len(self), desc="check images", delay=2, disable=not progress) as bar,
        ):
            for first in range(0, len(self), _AT_ONCE):
                for reason in readers.map(why_unreadable, self.files[first : first + _AT_ONCE]):
                    bad += [reason] if reason else []
                    bar.update()
        if bad:
            named = ", ".join(bad[:_NAMED]) + (", ..." if len(bad) > _NAMED else "")
            raise UserError(
                f"{len(bad):,} of {len(self):,} images of --data cannot be read: {named}; mend or remove them"
            )

    def image(self, index: int, channels: int, height: int, width: int) -> Tensor:
        """uint8 (C, H, W): scaled until it covers the size, then cropped at the centre.

        Raises:
            UserError: it cannot be read; it is named.
        """
        if isinstance(self.files, Tensor):
            pixels = self.files[index]
            array = pixels.squeeze(0).numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
            return fitted(Image.fromarray(array), channels, height, width)
        try:
            with opened(self.files[index]) as picture:
                return fitted(upright(picture), channels, height, width)
        except UNREADABLE as error:
            raise UserError(f"{self.files[index]} is not an image that can be read; remove it from --data") from error


def read_images(source: str) -> RealImages:
    """Real images from ``--data``.

    A folder with a ``metadata.jsonl`` (``file_name`` and ``text`` or ``label``), with class sub-folders, with idx files
    (MNIST's format, 28 x 28 padded to 32 x 32), or the word ``fashion`` for the images shipped with the package.

    Hidden files and folders are no data. Class folders of which those with images are called by numbers are labels;
    else each has the number of its place among all visible folders in alphabetical order, as in every image-folder
    data set, whether it holds images or not.

    Raises:
        UserError: the folder is missing, empty, or of none of these forms.
    """
    if source == "fashion":
        from fewstep.fashion import training_images  # data of 3 MB, read only when asked for
        from fewstep.fashion.files import TRAINING_IMAGES, verified

        images, labels = training_images()
        return RealImages(images, labels.tolist(), sources=(verified(TRAINING_IMAGES),))
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"--data {source} is not a folder")
    if (folder / "metadata.jsonl").is_file():
        return _from_metadata(folder)
    if idx_files := sorted(folder.glob("train-images-idx3-ubyte*")):
        return _from_idx(idx_files[0])
    found = find_images(folder)
    passed_over = passed_over_line(found.passed_over)
    if not found.files:
        forms = f"no images ({', '.join(sorted(SUFFIXES))}), no metadata.jsonl, no idx files"
        raise UserError(f"--data {source} holds {forms}{passed_over}")
    if not found.classes:
        return RealImages(found.files, None, passed_over=passed_over)
    names = [file.parent.name for file in found.files]
    # Folders called 0, 1, ..., 10 are labels: their alphabetical order (0, 1, 10, 2) would exchange classes.
    captions: list[Any] = [int(name) for name in names] if all(map(str.isdecimal, names)) else names
    return RealImages(found.files, captions, found.classes, passed_over=passed_over)


def image_contents(images: RealImages, source: str, known: Contents | None = None) -> Contents:
    """The digests of images and of what they show, see :func:`fewstep.data.contents.contents_of`.

    Args:
        images: that :func:`read_images` found.
        source: where.
        known: what was found earlier.
    """
    files = [*images.sources, *([] if isinstance(images.files, Tensor) else images.files)]
    root = Path(source) if Path(source).is_dir() else files[0]
    shown = {"sha256": json_sha256([images.classes, images.captions])}
    return {**contents_of(root, files, known), "what they show": shown}


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
            captions.append(row["text"] if "text" in row else _label(row["label"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{source}, line {number}: wants file_name and text or label") from error
        if not isinstance(captions[-1], str if "text" in row else int):
            raise UserError(f"{source}, line {number}: the text must be a string, not {captions[-1]!r}")
        if type(captions[-1]) is not type(captions[0]):
            raise UserError(f"{source}, line {number}: give every image a text, or every image a label")
        if not files[-1].is_file():
            raise UserError(f"{source}, line {number}: there is no file {files[-1]}")
    return RealImages(files, captions, sources=(source,), passed_over=passed_over_line(unlisted(folder, files)))


def _label(value: Any) -> int:
    """A whole number, as JSON has it or as a text; half a class, or true, is a mistake."""
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(value)
    return int(value)


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
    return RealImages(padded.unsqueeze(1), classes.tolist(), sources=(images, labels))


def read_idx(path: Path) -> Tensor:
    """A uint8 tensor from a (gzipped) file in MNIST's idx format."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        kind, rank = struct.unpack(">HBB", file.read(4))[1:]
        shape = struct.unpack(f">{rank}I", file.read(4 * rank))
        data = file.read()
    if kind != 8 or len(data) != int(np.prod(shape)):
        raise ValueError(f"{path} is not an idx file of bytes, or is truncated")
    return torch.from_numpy(np.frombuffer(data, np.uint8).reshape(shape).copy())
