"""Real images with what they show, as real samples of a teacher: their captions meet its kind of condition."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.data.conditions import Conditions
from fewstep.data.image_folders import some_of
from fewstep.data.images import RealImages, image_size
from fewstep.data.latents import Latents
from fewstep.data.read_ahead import ReadAhead
from fewstep.data.real import Encoded, Known, RealSamples
from fewstep.errors import UserError
from fewstep.recording import Recording
from fewstep.recording.codec import refuse_no_encoder


def captioned(
    images: RealImages | Latents,
    recording: Recording,
    conditions: Conditions,
    device: torch.device | str = "cpu",
    *,
    workers: int = 0,
) -> RealSamples:
    """Images as real samples, each with its condition.

    A text is encoded as a prompt; a label k of a text-conditioned run is the run's k-th prompt where their numbers
    agree, else the word itself; class folders are labels where all are called by numbers, else they count in
    alphabetical order, empty ones too.

    Args:
        images: what was read, or is encoded already.
        recording: of the teacher.
        conditions: of the run; its items are what labels of a text-conditioned teacher refer to.
        device: where batches are put.
        workers: threads that read images; 0 reads them when they are asked for.

    Returns:
        The samples, whose note says how many images there are, what each class folder stands for, and what was passed
        over.

    Raises:
        UserError: the images have no captions and the teacher needs them, or they contradict each other; or its
            autoencoder cannot encode.
    """
    known: Known
    if isinstance(images, Latents):
        images.refuse_other_teacher(recording)
        known = _Stored(images, workers)
    else:
        refuse_no_encoder(recording.pipeline)
        size = image_size(recording)
        known = Encoded(
            len(images), lambda row: images.image(row, *size), lambda _, pixels: recording.encode(pixels), workers
        )
    rows, shown, meaning = _captions_to_conditions(images, recording, conditions, device)
    return RealSamples(known, rows, shown, device, f"--data: {len(images):,} images{meaning}{_about(images)}")


class _Stored:
    """Latents, read ahead."""

    def __init__(self, latents: Latents, workers: int) -> None:
        self._count, self._reader = len(latents), ReadAhead(latents.x0, workers)

    def __len__(self) -> int:
        return self._count

    def announce(self, rows: Iterable[int]) -> None:
        self._reader.announce(rows)

    def x0(self, rows: Sequence[int]) -> Tensor:
        return self._reader.take(rows)


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
