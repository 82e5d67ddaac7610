"""Real samples in the network's own space, in the run's keyed order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.batch import Real
from fewstep.data.conditions import Conditions
from fewstep.data.images import RealImages
from fewstep.diffusion.draws import keyed_order
from fewstep.errors import UserError
from fewstep.recording import Recording

_CACHE_LIMIT = 2**31  # bytes of encoded real samples kept in memory


class RealSamples:
    """Real images in the network's space, each with its condition, in a keyed order.

    Captions meet the teacher's kind of condition: a text is encoded as a prompt; a label k of a text-conditioned run is
    the run's k-th prompt where their numbers agree, else the word itself; class folders are labels where all are called
    by numbers, else they count in alphabetical order.

    Args:
        images: what was read.
        recording: of the teacher.
        conditions: of the run; its items are what labels of a text-conditioned teacher refer to.
        device: where batches are put.

    Raises:
        UserError: the images have no captions and the teacher needs them.
    """

    def __init__(
        self, images: RealImages, recording: Recording, conditions: Conditions, device: torch.device | str = "cpu"
    ) -> None:
        self.images = images
        self._encode = recording.encode
        self._device = device
        self._size = recording.decode(torch.zeros(1, *recording.sample_shape)).shape[1:]
        if len(self._size) != 3:
            raise UserError("--data gives images, and this teacher makes videos; train without --data")
        self._rows, self._conditions = _captions_to_conditions(images, recording, conditions, device)
        self._cache: dict[int, Tensor] = {}
        self._bytes = 4 * int(np.prod(recording.sample_shape))

    def batch(self, seed: int, positions: Sequence[int]) -> Real:
        """The real samples at these places of the run's endless, keyed stream."""
        rows = [keyed_order(seed, "real", len(self.images), position) for position in positions]
        return Real(self.x0(rows), self._conditions.select([self._rows[row] for row in rows]))

    @torch.no_grad()
    def x0(self, rows: Sequence[int]) -> Tensor:
        """The images with these numbers in the network's space, (B, ...)."""
        missing = [row for row in dict.fromkeys(rows) if row not in self._cache]
        fresh: dict[int, Tensor] = {}
        if missing:
            pixels = torch.stack([self.images.image(row, *self._size) for row in missing])
            fresh = dict(zip(missing, self._encode(pixels).cpu()))
            if (len(self._cache) + len(missing)) * self._bytes <= _CACHE_LIMIT:
                self._cache |= fresh
        x0 = [fresh[row] if row in fresh else self._cache[row] for row in rows]
        return torch.stack(x0).to(self._device, non_blocking=True)

    def rows_among(self, conditions: Conditions) -> list[int]:
        """For each image the number of its condition among those of a run.

        Raises:
            UserError: an image shows something else.
        """
        if self._conditions is not conditions:
            other = next(item for item in self._conditions.items() if conditions.rows([item]) is None)
            raise UserError(f"--data shows {other!r}, which is not among the prompts or classes; add it to them")
        return self._rows


def _captions_to_conditions(
    images: RealImages, recording: Recording, conditions: Conditions, device: torch.device | str
) -> tuple[list[int], Conditions]:
    """For each image the row of its condition, and the conditions that these rows count in."""
    if conditions.kind is None:
        return [0] * len(images), conditions
    captions: list[Any] | None = images.captions  # texts or labels
    if captions is None:
        raise UserError(
            "--data has images without captions, and this teacher is conditioned; add class folders or metadata.jsonl"
        )
    distinct = sorted(set(captions))
    numbers = all(isinstance(caption, int) for caption in distinct)
    if conditions.kind == "label":
        # Names of class folders stand for 0, 1, 2, ... in alphabetical order, as in every image-folder data set.
        items: list[Any] = distinct if numbers else list(range(len(distinct)))
    elif numbers and len(distinct) == len(conditions) and distinct == list(range(len(distinct))):
        return list(captions), conditions
    else:
        items = [str(caption) for caption in distinct]
    rows = conditions.rows(items)
    if rows is None:  # what the run does not generate is encoded beside it
        rows = list(range(len(items)))
        of_prompts = conditions.kind == "prompt"
        conditions = Conditions(recording, items if of_prompts else None, None if of_prompts else items, device)
    place = dict(zip(distinct, rows, strict=True))
    return [place[caption] for caption in captions], conditions
