"""Read the Fashion-MNIST idx files, pad to 32x32 and split off the images that train nothing."""

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UserError

DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
IMAGES_TYPE, LABELS_TYPE = 0x0803, 0x0801
_MOST_BYTES = 2**26  # of a file: the largest of the data set, unpacked, has 47,040,016
SPLIT_SEED = 20170825
HELD_BACK_PER_CLASS = 500
SHIPPED_PER_CLASS = 1000


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, 1, 32, 32), black border of two pixels, and labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """train: 55,000 images, the only ones that train anything. held_back: 5,000, 500 a class. test: 10,000."""

    train: Split
    held_back: Split
    test: Split


def _read_idx(folder: Path, name: str, expected_type: int) -> np.ndarray:
    """The array of one idx file, compressed or not."""
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            break
    else:
        raise UserError(
            f"{folder / name}.gz not found: install Debian's package dataset-fashion-mnist, "
            "or pass --data with a folder that holds the four Fashion-MNIST idx files"
        )
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again") from error
    if len(content) > _MOST_BYTES:
        raise UserError(
            f"{path} holds more than {_MOST_BYTES:,} bytes, and is no file of Fashion-MNIST: fetch it again"
        )
    dimensions = expected_type & 0xFF
    header = np.frombuffer(content, dtype=">u4", count=min(1 + dimensions, len(content) // 4))
    if len(header) != 1 + dimensions or header[0] != expected_type:
        raise UserError(f"{path} is not the idx file it should be: fetch it again")
    shape = tuple(int(size) for size in header[1:])
    values = np.frombuffer(content, dtype=np.uint8, offset=4 * len(header))
    if values.size != math.prod(shape):
        raise UserError(f"{path} is cut short ({values.size} values of {math.prod(shape)}): fetch it again")
    return values.reshape(shape)


def _read_part(folder: Path, part: str) -> Split:
    images_name, labels_name = FILES[part]
    images = torch.from_numpy(_read_idx(folder, images_name, IMAGES_TYPE).copy())[:, None]
    labels = torch.from_numpy(_read_idx(folder, labels_name, LABELS_TYPE).astype(np.int64))
    if len(images) != len(labels) or images.shape[1:] != (1, 28, 28):
        raise UserError(f"{folder}: {len(images)} images of {tuple(images.shape[2:])} but {len(labels)} labels")
    return Split(torch.nn.functional.pad(images, (2, 2, 2, 2)), labels)


def load(folder: Path = DEFAULT_FOLDER) -> Dataset:
    """The three parts, always split the same way (a seeded choice of 500 images a class is held back).

    Raises:
        UserError: when a file is missing or broken.
    """
    train, test = _read_part(folder, "train"), _read_part(folder, "test")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_back = torch.zeros(len(train), dtype=torch.bool)
    for label in range(10):
        held_back[order[train.labels[order] == label][:HELD_BACK_PER_CLASS]] = True
    return Dataset(
        train=Split(train.images[~held_back], train.labels[~held_back]),
        held_back=Split(train.images[held_back], train.labels[held_back]),
        test=test,
    )


def shipped(train: Split) -> Split:
    """The first 1,000 training images of each class, in the order of the file."""
    chosen = torch.cat([(train.labels == label).nonzero()[:SHIPPED_PER_CLASS, 0] for label in range(10)]).sort().values
    return Split(train.images[chosen], train.labels[chosen])
