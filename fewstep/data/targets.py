"""The wanted results of items (their column ``target``) in the network's own space, in the run's keyed order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fewstep.conditioning.outside import pins_of
from fewstep.data.captioned import captioned
from fewstep.data.conditions import Conditions
from fewstep.data.image_opening import fitted
from fewstep.data.item_pictures import Picture
from fewstep.data.items import Items
from fewstep.data.latents import read_data
from fewstep.data.real import Encoded, RealSamples
from fewstep.errors import UserError
from fewstep.recording import Recording
from fewstep.recording.codec import refuse_no_encoder

#: What ``--data`` calls them.
TARGETS = "targets"


def real_samples(
    source: str,
    text: str | None,
    index: Path,
    items: Items | None,
    recording: Recording,
    conditions: Conditions,
    device: torch.device | str,
    *,
    workers: int = 0,
) -> RealSamples:
    """What ``--data`` means: images that lie somewhere, or the results of a run's items.

    Args:
        source: of ``--data``.
        text: of ``--data_text``.
        index: folder in which it is kept what shards hold.
        items: of the run.
        recording: of the teacher.
        conditions: of the run.
        device: where batches are put.
        workers: threads that read images.

    Raises:
        UserError: they cannot be used.
    """
    if source == TARGETS:
        return target_samples(items, recording, conditions, device, workers=workers)
    return captioned(read_data(source, text, index), recording, conditions, device, workers=workers)


def target_samples(
    items: Items | None,
    recording: Recording,
    conditions: Conditions,
    device: torch.device | str = "cpu",
    *,
    workers: int = 0,
) -> RealSamples:
    """The results of a run's items as real samples, each for its own item.

    A picture is brought to the size that the item's sample has; a clip has as many frames.

    Args:
        items: of the run.
        recording: of the teacher.
        conditions: of the run, which are these items.
        device: where batches are put.
        workers: threads that read pictures; 0 reads them when they are asked for.

    Raises:
        UserError: the items have no results, or one cannot be a sample of the teacher; its row is named. Or what a
            sample becomes is no affine function of it, so that nothing is known of a picture's.
    """
    items = wanted_results(items)
    refuse_no_encoder(recording.pipeline)
    shown = _Targets(items, recording, conditions)
    known = Encoded(len(items), shown.pixels, shown.encoded, workers)
    return RealSamples(known, range(len(items)), conditions, device, f"--data {TARGETS}: those of {len(items):,} items")


def wanted_results(items: Items | None) -> Items:
    """The items of a run, which have results.

    Raises:
        UserError: they have none, or there are none.
    """
    if items is None or not items.targets:
        whose = "--items" if items is None else items.name
        raise UserError(f"--data {TARGETS} is the column target of {whose}, and no row has one: give each its own")
    return items


class _Targets:
    """The results of items, as pixels and in the network's space.

    Raises:
        UserError: one cannot be a sample of the teacher.
    """

    def __init__(self, items: Items, recording: Recording, conditions: Conditions) -> None:
        self._items, self._targets = items.each, items.targets
        self._recording, self._conditions = recording, conditions
        self._sizes = {shape: _size(recording, shape) for shape, _ in conditions.sizes()}
        for row in range(len(items)):
            self._refuse_other_form(row)

    def _refuse_other_form(self, row: int) -> None:
        wanted, target = self._sizes[self._conditions.shape(row)], self._targets[row]
        frames = len(target) if isinstance(target, list) else None
        if len(wanted) == 3 and frames is not None:
            raise UserError(f"{self._items[row]}: target is a clip or several pictures, and this teacher makes one")
        if len(wanted) == 4 and frames != wanted[1]:
            has = "one picture" if frames is None else f"{frames} frames"
            raise UserError(f"{self._items[row]}: target has {has}, and this teacher makes {wanted[1]} frames")

    def pixels(self, row: int) -> Tensor:
        """Of one, uint8 (C, H, W), or (C, F, H, W)."""
        target = self._targets[row]
        channels, *_, height, width = self._sizes[self._conditions.shape(row)]
        frames = [_opened(self._items[row], one) for one in (target if isinstance(target, list) else [target])]
        shown = [fitted(frame, channels, height, width) for frame in frames]
        return torch.stack(shown, 1) if isinstance(target, list) else shown[0]

    def encoded(self, row: int, pixels: Tensor) -> Tensor:
        """A result in the network's space: 0 where the network is told nothing, and what is pinned as its item says."""
        own = self._recording.at(self._conditions.shape(row))
        x0 = own.encode(pixels)
        if (unread := own.recipe.unread) is not None:
            x0 = x0.masked_fill(unread.to(x0.device), 0.0)
        pins = pins_of(self._conditions.one(row))
        return x0 if pins is None else torch.where(pins.where.to(x0.device), pins.value.to(x0), x0)


def _size(recording: Recording, shape: tuple[int, ...]) -> Sequence[int]:
    """(C, [F,] H, W) of what samples of a shape show."""
    return recording.at(shape).decode(torch.zeros(1, *shape)).shape[1:]


def _opened(item: Any, shown: Any) -> Image.Image:
    if isinstance(shown, Picture):
        return shown.open()
    if isinstance(shown, Image.Image):
        return shown
    raise UserError(f"{item}: target is a {type(shown).__name__}: give a picture, or a list of frames")
