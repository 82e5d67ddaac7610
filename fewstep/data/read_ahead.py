"""Images are read and cropped beside the training, by threads: Pillow lets others work while it decodes and resizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class ReadAhead:
    """Gives images in whatever order they are asked for; those that were announced are there already, or under way.

    What is given does not depend on the number of threads, nor on what was announced.

    Args:
        read: gives the tensor of a row; all are of one shape.
        workers: threads; 0 reads when images are asked for.
    """

    def __init__(self, read: Callable[[int], Tensor], workers: int) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(workers, "fewstep-images") if workers else None
        self._coming: dict[int, Future[Tensor]] = {}

    def announce(self, rows: Iterable[int]) -> None:
        """These are asked for next."""
        if self._pool is not None:
            for row in rows:
                if row not in self._coming:
                    self._coming[row] = self._pool.submit(self._read, row)

    def take(self, rows: Sequence[int]) -> Tensor:
        """(B, ...) of the rows with these numbers.

        Raises:
            UserError: one cannot be read.
        """
        self.announce(rows)
        coming = self._coming
        read = [coming.pop(r).result() if r in coming else self._read(r) for r in rows]
        return torch.stack(read)
