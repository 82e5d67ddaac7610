"""Samples on their way into a benchmark's folder: which of its prompts each belongs to, and writing it as PNG."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fewstep.errors import UserError, one_line, printable
from fewstep.eval.exporters.benchmarks import Item

_SHOWN = 60  # characters of a prompt that an error quotes


@dataclass(frozen=True)
class Sample:
    """One sample. image: a picture of Pillow, or the file of one; prompt: None where there is none."""

    index: int
    prompt: str | None
    image: Image.Image | Path


class Placed(NamedTuple):
    """A sample and the prompt it belongs to. number: among those of this prompt, from 0."""

    item: Item
    number: int
    sample: Sample


class Places:
    """Which prompt of a benchmark a sample belongs to, by the prompt's words; white space does not count.

    items: of the benchmark; of prompts that it has twice each gets samples in turn. None: every prompt is welcome, and
    its key is the number of its first sample.
    """

    def __init__(self, items: Iterable[Item] | None) -> None:
        self._closed = items is not None
        self.items: list[Item] = list(items or ())
        self.counts: dict[str, int] = {item.key: 0 for item in self.items}
        self._of_words: dict[str, list[Item]] = {}
        for item in self.items:
            self._of_words.setdefault(_words(item.prompt), []).append(item)

    def place(self, samples: Iterable[Sample]) -> Iterator[Placed]:
        """Each sample with its prompt, as they come.

        Raises:
            UserError: a sample has no prompt, or one that the benchmark does not have.
        """
        for sample in samples:
            item = self._item(sample)
            number = self.counts[item.key]
            self.counts[item.key] += 1
            yield Placed(item, number, sample)

    def notes(self) -> list[str]:
        """How many prompts have no sample: the benchmark's reader may skip them silently."""
        lacking = [item for item in self.items if not self.counts[item.key]]
        if not lacking:
            return []
        return [
            f"{len(lacking)} of the benchmark's {len(self.items)} prompts have no sample: its score is of the others"
        ]

    def _item(self, sample: Sample) -> Item:
        if sample.prompt is None:
            raise UserError(f"sample {sample.index} has no prompt, so it belongs to no prompt of a benchmark")
        words = _words(sample.prompt)
        if not self._closed and words not in self._of_words:
            item = Item(f"{sample.index:05d}", sample.prompt)
            self._of_words[words] = [item]
            self.items.append(item)
            self.counts[item.key] = 0
        if words not in self._of_words:
            shown = printable(sample.prompt[:_SHOWN])
            raise UserError(
                f"the benchmark has no prompt {shown!r}: sample its own, or give the file that these are from"
            )
        return min(self._of_words[words], key=lambda item: self.counts[item.key])


def picture(sample: Sample) -> Image.Image:
    """A sample's picture in RGB. Raises UserError where its file is none."""
    if isinstance(sample.image, Image.Image):
        return sample.image.convert("RGB")
    try:
        with Image.open(sample.image) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"the picture of sample {sample.index} cannot be read: {one_line(error)}") from error


def write_png(sample: Sample, path: Path, *, level: int = 6) -> None:
    """A sample as an RGB PNG; a file that is one already is copied as it is. level: of compression, 0 to 9."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(sample.image, Path) and _is_rgb_png(sample.image):
        shutil.copyfile(sample.image, path)
    else:
        picture(sample).save(path, format="PNG", compress_level=level)


def _is_rgb_png(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.format == "PNG" and image.mode == "RGB"
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return False


def _words(prompt: str) -> str:
    return " ".join(prompt.split())
