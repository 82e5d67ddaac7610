"""Real images and what they show, for GAN terms and for training from data."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Sequence
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
from fewstep.data.image_shards import ImageShards, find_shards
from fewstep.data.image_tables import find_table, read_table, read_texts_beside
from fewstep.errors import UserError
from fewstep.recording import Recording

_AT_ONCE = 4096  # images that are handed to the readers together
_CHECKED = 50_000  # images that are read before a run at most
_MOST_IDX = 2**30  # bytes of an idx file, unpacked: the largest of MNIST's kind, EMNIST, has 640 million
_NAMED = 5  # of the files that cannot be read


@dataclass(frozen=True)
class RealImages:
    """Real images and what each shows.

    Attributes:
        files: paths, shards, or a uint8 tensor (N, C, H, W).
        captions: a text or a label for each, None where the data says nothing.
        classes: the names of all class folders, in the order of their numbers; empty where there are none.
        sources: the files that they were read from, the images' own apart.
        passed_over: how many files of the folder are no data, and why: the end of a line for people, or empty.
        texts: for a teacher of prompts, in the place of ``captions``; None where the data has no texts of images.
    """

    files: list[Path] | ImageShards | Tensor
    captions: Sequence[str] | Sequence[int] | None
    classes: tuple[str, ...] = ()
    sources: tuple[Path, ...] = ()
    passed_over: str = ""
    texts: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def refuse_unreadable(self, progress: bool = False) -> None:
        """Read every image once, or of large sets some of all, so that none stops a run in its middle.

        Raises:
            UserError: some cannot be read; they are named.
        """
        if isinstance(self.files, Tensor):
            return
        bad: list[str] = []
        wanted = self.read_ahead_of_a_run()
        with (
            ThreadPoolExecutor(os.cpu_count()) as readers,
            tqdm(total=len(wanted), desc="check images", delay=2, disable=not progress) as bar,
        ):
            for first in range(0, len(wanted), _AT_ONCE):
                some = [self.files[number] for number in wanted[first : first + _AT_ONCE]]
                for reason in readers.map(why_unreadable, some):
                    bad += [reason] if reason else []
                    bar.update()
        if bad:
            named = ", ".join(bad[:_NAMED]) + (", ..." if len(bad) > _NAMED else "")
            raise UserError(
                f"{len(bad):,} of {len(wanted):,} images of --data cannot be read: {named}; mend or remove them"
            )

    def read_ahead_of_a_run(self) -> range:
        """The numbers of the images that :meth:`refuse_unreadable` reads: all, or evenly spaced ones of a large set."""
        return range(0, len(self), -(-len(self) // _CHECKED))

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


def read_images(
    source: str, text: str | None = None, index: Path | None = None, *, progress: bool = False
) -> RealImages:
    """Real images from ``--data``.

    A folder with a ``metadata.jsonl`` or ``metadata.csv`` (``file_name`` and ``text`` or ``label``), with class
    sub-folders, with a text beside each image, with idx files (MNIST's format, 28 x 28 padded to 32 x 32), or the word
    ``fashion`` for the images shipped with the package; or shards (:mod:`.tar_shards`, :mod:`.parquet_shards`): one, a
    folder of them, or a pattern.

    Hidden files and folders are no data. Class folders of which those with images are called by numbers are labels;
    else each has the number of its place among all visible folders in alphabetical order, as in every image-folder
    data set, whether it holds images or not.

    Args:
        source: where they are.
        text: ``--data_text``: which column, field or suffix has the texts; None: what is there.
        index: folder in which it is kept what shards hold.
        progress: show how far shards are looked through.

    Raises:
        UserError: the folder is missing, empty, or of none of these forms, or samples of shards cannot be used.
    """
    if source == "fashion":
        from fewstep.fashion import training_images  # data of 3 MB, read only when asked for
        from fewstep.fashion.files import TRAINING_IMAGES, verified

        images, labels = training_images()
        return RealImages(images, labels.tolist(), sources=(verified(TRAINING_IMAGES),))
    folder = Path(source)
    shards = find_shards(source)
    if not folder.is_dir():
        if shards:
            return _from_shards(shards, index, text, progress)
        raise UserError(f"--data {source} is not a folder, and no shards (.tar, .parquet)")
    if (table := find_table(folder)) is not None:
        return _from_table(table, text)
    if idx_files := sorted(folder.glob("train-images-idx3-ubyte*")):
        return _from_idx(idx_files[0])
    found = find_images(folder)
    if shards:
        if found.files:
            raise UserError(f"--data {source} holds images and shards; give the shards as {folder}/*{shards[0].suffix}")
        return _from_shards(shards, index, text, progress)
    if not found.files:
        forms = f"no images ({', '.join(sorted(SUFFIXES))}), no metadata.jsonl, no idx files, no shards"
        raise UserError(f"--data {source} holds {forms}{passed_over_line(found.passed_over)}")
    texts = read_texts_beside(found.files, found.passed_over)
    passed_over = passed_over_line(+found.passed_over)
    if not found.classes:
        return RealImages(found.files, None, passed_over=passed_over, texts=texts)
    names = [file.parent.name for file in found.files]
    # Folders called 0, 1, ..., 10 are labels: their alphabetical order (0, 1, 10, 2) would exchange classes.
    captions: list[Any] = [int(name) for name in names] if all(map(str.isdecimal, names)) else names
    return RealImages(found.files, captions, found.classes, passed_over=passed_over, texts=texts)


def image_size(recording: Recording) -> tuple[int, int, int]:
    """(C, H, W) of the images that a teacher makes.

    Raises:
        UserError: it makes videos.
    """
    size = recording.decode(torch.zeros(1, *recording.sample_shape)).shape[1:]
    if len(size) != 3:
        raise UserError("--data gives images, and this teacher makes videos; train without --data")
    return (size[0], size[1], size[2])


def image_contents(images: RealImages, source: str, known: Contents | None = None) -> Contents:
    """The digests of images and of what they show, see :func:`fewstep.data.contents.contents_of`.

    Args:
        images: that :func:`read_images` found.
        source: where.
        known: what was found earlier.
    """
    if isinstance(images.files, ImageShards):
        return images.files.contents(known)
    files = [*images.sources, *([] if isinstance(images.files, Tensor) else images.files)]
    root = Path(source) if Path(source).is_dir() else files[0]
    told = [images.texts] if images.texts is not None and images.texts is not images.captions else []
    shown = {"sha256": json_sha256([images.classes, images.captions, *told])}
    return {**contents_of(root, files, known), "what they show": shown}


def _from_table(table: Path, text: str | None) -> RealImages:
    files, texts, labels = read_table(table, text)
    passed_over = passed_over_line(unlisted(table.parent, files, table.name))
    shown: list[str] | list[int] | None = labels if labels is not None else texts
    return RealImages(files, shown, sources=(table,), passed_over=passed_over, texts=texts)


def _from_shards(paths: list[Path], index: Path | None, text: str | None, progress: bool) -> RealImages:
    images = ImageShards(paths, index, text, progress)
    return RealImages(images, images.labels, passed_over=passed_over_line(images.passed_over), texts=images.texts)


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
        size = math.prod(shape)
        if size > _MOST_IDX:
            raise ValueError(f"{path} says that it holds {size:,} bytes, which is more than {_MOST_IDX:,}")
        data = file.read(size + 1)  # a packed file may hold far more than it says
    if kind != 8 or len(data) != size:
        raise ValueError(f"{path} is not an idx file of bytes, or is truncated")
    return torch.from_numpy(np.frombuffer(data, np.uint8).reshape(shape).copy())
