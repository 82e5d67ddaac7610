"""Real samples in the network's own space, in the run's keyed order."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.batch import Real
from fewstep.data.conditions import Conditions
from fewstep.data.image_folders import some_of
from fewstep.data.images import RealImages, image_size
from fewstep.data.latents import Latents
from fewstep.data.read_ahead import ReadAhead
from fewstep.diffusion.draws import keyed_order
from fewstep.errors import UserError
from fewstep.recording import Recording
from fewstep.recording.codec import refuse_no_encoder

_CACHE_LIMIT = 2**31  # bytes of encoded real samples kept in memory


class RealSamples:
    """Real images in the network's space, each with its condition, in a keyed order.

    Captions meet the teacher's kind of condition: a text is encoded as a prompt; a label k of a text-conditioned run is
    the run's k-th prompt where their numbers agree, else the word itself; class folders are labels where all are called
    by numbers, else they count in alphabetical order, empty ones too.

    Args:
        images: what was read, or is encoded already.
        recording: of the teacher.
        conditions: of the run; its items are what labels of a text-conditioned teacher refer to.
        device: where batches are put.
        workers: threads that read images; 0 reads them when they are asked for.

    Attributes:
        note: one line: how many images there are, what each class folder stands for, and what was passed over.

    Raises:
        UserError: the images have no captions and the teacher needs them, or they contradict each other; or its
            autoencoder cannot encode.
    """

    def __init__(
        self,
        images: RealImages | Latents,
        recording: Recording,
        conditions: Conditions,
        device: torch.device | str = "cpu",
        *,
        workers: int = 0,
    ) -> None:
        self.images = images
        if isinstance(images, Latents):
            images.refuse_other_teacher(recording)
            self._reader = ReadAhead(images.x0, workers)
        else:
            refuse_no_encoder(recording.pipeline)
            size = image_size(recording)
            self._reader = ReadAhead(lambda row: images.image(row, *size), workers)
        rows, shown, meaning = _captions_to_conditions(images, recording, conditions, device)
        self._begin(rows, shown, device, self._reader, recording)
        self.note = f"--data: {len(images):,} images{meaning}{_about(images)}"

    def _begin(
        self,
        rows: list[int],
        conditions: Conditions,
        device: torch.device | str,
        reader: ReadAhead,
        recording: Recording,
    ) -> None:
        """Keep for each image the row of its condition, and read none yet."""
        self._rows, self._conditions, self._device, self._reader = rows, conditions, device, reader
        self._encode = recording.encode
        self._among: Sequence[int] = range(len(rows))
        self._cache: dict[int, Tensor] = {}
        self._bytes = 4 * int(np.prod(recording.sample_shape))

    def only(self, conditions: Conditions, rows: Sequence[int], part: Conditions) -> RealSamples:
        """The images that show some of a run's conditions, which are known by their numbers in ``part`` from then on.

        Args:
            conditions: of the run.
            rows: numbers of some of them.
            part: these alone, :meth:`fewstep.data.conditions.Conditions.only`.

        Raises:
            UserError: an image shows nothing that the run generates, or none shows one of these.
        """
        places = {row: place for place, row in enumerate(rows)}
        shown = self.rows_among(conditions)
        some = copy.copy(self)
        some._among = [image for image, row in enumerate(shown) if row in places]
        if not some._among:
            raise UserError(f"--data has no image of the {len(rows):,} {conditions.kind}s that are trained here")
        some._rows, some._conditions = [places.get(row, -1) for row in shown], part
        return some

    def batch(self, seed: int, positions: Sequence[int]) -> Real:
        """The real samples at these places of the run's endless, keyed stream."""
        rows = self._rows_at(seed, positions)
        drawn = self._conditions.drawn(seed, "real", positions)
        return Real(self.x0(rows), self._conditions.select([self._rows[row] for row in rows], drawn))

    def announce(self, seed: int, positions: Sequence[int]) -> None:
        """The places that are asked for next: their images are read while the device is at work."""
        self._reader.announce(row for row in self._rows_at(seed, positions) if row not in self._cache)

    def _rows_at(self, seed: int, positions: Sequence[int]) -> list[int]:
        return [self._among[keyed_order(seed, "real", len(self._among), position)] for position in positions]

    @torch.no_grad()
    def x0(self, rows: Sequence[int]) -> Tensor:
        """The images with these numbers in the network's space, (B, ...)."""
        if isinstance(self.images, Latents):
            return self._reader.take(rows).to(self._device, non_blocking=True)
        missing = [row for row in dict.fromkeys(rows) if row not in self._cache]
        fresh: dict[int, Tensor] = {}
        if missing:
            # Each alone: what an image becomes depends neither on its batch nor on where a run was resumed.
            pixels = (self._reader.take(missing).float() / 255).split(1)
            fresh = dict(zip(missing, torch.cat([self._encoded(*one) for one in zip(missing, pixels)]).cpu()))
            if (len(self._cache) + len(missing)) * self._bytes <= _CACHE_LIMIT:
                self._cache |= fresh
        x0 = [fresh[row] if row in fresh else self._cache[row] for row in rows]
        return torch.stack(x0).to(self._device, non_blocking=True)

    def _encoded(self, row: int, pixels: Tensor) -> Tensor:
        """An image (1, ...) in [0, 1] in the network's space."""
        return self._encode(pixels)

    def rows_among(self, conditions: Conditions) -> list[int]:
        """For each image the number of its condition among those of a run.

        Raises:
            UserError: an image shows something else.
        """
        if self._conditions is not conditions:
            other = next(item for item in self._conditions.items() if conditions.rows([item]) is None)
            raise UserError(f"--data shows {other!r}, which is not among the prompts or classes; add it to them")
        return self._rows


def _about(images: RealImages | Latents) -> str:
    """The end of a line: what was passed over, and how many images are read before a run where that is not all."""
    if isinstance(images, Latents):
        return ", encoded already"
    count = len(images.read_ahead_of_a_run())
    some = f"; {count:,} of them, evenly spaced, are read before training" if count < len(images) else ""
    return some + images.passed_over


def _captions_to_conditions(
    images: RealImages | Latents, recording: Recording, conditions: Conditions, device: torch.device | str
) -> tuple[list[int], Conditions, str]:
    """For each image the row of its condition, the conditions that these rows count in, and in words what is what."""
    if conditions.kind is None:
        return [0] * len(images), conditions, ""
    if conditions.kind == "item":
        raise UserError(
            "--data has images without the items that they are the results of: give each row of --items its own as the "
            "column target, and --data targets"
        )
    captions: Sequence[Any] | None = images.captions  # texts or labels
    classes = images.classes
    if conditions.kind == "prompt" and images.texts is not None:
        captions, classes = images.texts, ()
    if captions is None:
        raise UserError(
            "--data has texts alone, and this teacher takes labels; add .cls, a column label, or class folders"
            if images.texts is not None
            else "--data has images without captions, and this teacher is conditioned; "
            "add class folders or metadata.jsonl"
        )
    distinct = sorted(set(captions))
    numbers = all(isinstance(caption, int) for caption in distinct)
    rows: list[int] | None = None
    items: list[Any]
    if conditions.kind == "label":
        items = [*(distinct if numbers else _places(distinct, classes))]
    elif numbers and _counts(distinct, classes, len(conditions)):
        items, rows = [conditions.items()[label] for label in distinct], distinct
    else:
        items = [str(caption) for caption in distinct]
    meaning = _meaning(classes, dict(zip(distinct, items, strict=True)), conditions.kind)
    if rows is None:
        rows = conditions.rows(items)
    if rows is None:  # what the run does not generate is encoded beside it
        rows = list(range(len(items)))
        if conditions.kind == "prompt":
            conditions = Conditions(recording, prompts=items, device=device)
        else:
            conditions = Conditions(recording, labels=items, device=device)
    place = dict(zip(distinct, rows, strict=True))
    return [place[caption] for caption in captions], conditions, meaning


def _places(names: list[str], classes: tuple[str, ...]) -> list[int]:
    """The numbers of named classes: their places among all class folders, or among themselves where there are none."""
    if numbered := [name for name in classes if name in names and name.isdecimal()]:
        named = next(name for name in names if not name.isdecimal())
        raise UserError(
            f"--data has class folders called by numbers ({numbered[0]}) and one called {named!r}, so that their "
            "labels are not known; name all by numbers, or none"
        )
    order = classes or names
    return [order.index(name) for name in names]


def _counts(labels: list[int], classes: tuple[str, ...], prompts: int) -> bool:
    """Whether labels count a run's prompts: 0 to its last one, folders without an image among them."""
    folders = {int(name) for name in classes if name.isdecimal()}
    return set(labels) | folders == set(range(prompts))


def _meaning(classes: tuple[str, ...], items: dict[Any, Any], kind: str) -> str:
    """What every class folder stands for, in words; empty where there are none."""
    if not classes:
        return ""
    by_number = all(isinstance(caption, int) for caption in items)
    parts = []
    for place, name in enumerate(classes):
        caption = int(name) if by_number and name.isdecimal() else name
        if caption in items:
            parts.append(f"{name} is {items[caption]!r}")
        elif kind == "label" and not by_number:
            parts.append(f"{name} is {place}, without an image")
        else:
            parts.append(f"{name} without an image")
    return f" in {len(classes):,} class folders, as {kind}s: {some_of(parts)}"
