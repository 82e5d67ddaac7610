"""Images are read and cropped beside the training, by threads: Pillow lets others work while it decodes and resizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from fewstep.data.images import RealImages


class ReadAhead:
    """Gives images in whatever order they are asked for; those that were announced are there already, or under way.

    What is given does not depend on the number of threads, nor on what was announced.

    Args:
        images: what is read.
        size: (C, H, W) of all of them.
        workers: threads; 0 reads when images are asked for.
    """

    def __init__(self, images: RealImages, size: tuple[int, int, int], workers: int) -> None:
        self._images, self._size = images, size
        self._pool = ThreadPoolExecutor(workers, "fewstep-images") if workers else None
        self._coming: dict[int, Future[Tensor]] = {}

    def announce(self, rows: Iterable[int]) -> None:
        """These are asked for next."""
        if self._pool is not None:
            for row in rows:
                if row not in self._coming:
                    self._coming[row] = self._pool.submit(self._images.image, row, *self._size)

    def take(self, rows: Sequence[int]) -> Tensor:
        """uint8 (B, C, H, W) of the images with these numbers.

        Raises:
            UserError: one cannot be read.
        """
        self.announce(rows)
        coming = self._coming
        read = [coming.pop(r).result() if r in coming else self._images.image(r, *self._size) for r in rows]
        return torch.stack(read)
