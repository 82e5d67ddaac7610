"""Real samples in the network's own space, in the run's keyed order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fewstep.data.batch import Real
from fewstep.data.conditions import Conditions
from fewstep.data.read_ahead import ReadAhead
from fewstep.diffusion.draws import keyed_order
from fewstep.errors import UserError

_CACHE_LIMIT = 2**31  # bytes of encoded real samples kept in memory


class Known(Protocol):
    """Real samples by their numbers: :class:`Encoded`, or read as they were stored."""

    def __len__(self) -> int: ...

    def announce(self, rows: Iterable[int]) -> None:
        """These are asked for next: what of them lies on a disk is read while the device is at work."""
        ...

    def x0(self, rows: Sequence[int]) -> Tensor:
        """Those with these numbers in the network's space, (B, ...), on the CPU."""
        ...


class Encoded:
    """Real samples that are encoded when they are first asked for, and kept in memory while there is room for them.

    Args:
        count: how many there are.
        read: gives the pixels of one, uint8 (C, [F,] H, W).
        encode: from its number and its pixels (1, ...) in [0, 1] to the network's space (1, ...).
        workers: threads that read; 0 reads when they are asked for.
    """

    def __init__(
        self, count: int, read: Callable[[int], Tensor], encode: Callable[[int, Tensor], Tensor], workers: int = 0
    ) -> None:
        self._count, self._encode, self._reader = count, encode, ReadAhead(read, workers)
        self._kept: dict[int, Tensor] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return self._count

    def announce(self, rows: Iterable[int]) -> None:
        """As :class:`Known`; what is kept is not read again."""
        self._reader.announce(row for row in rows if row not in self._kept)

    @torch.no_grad()
    def x0(self, rows: Sequence[int]) -> Tensor:
        """As :class:`Known`."""
        fresh: dict[int, Tensor] = {}
        if missing := [row for row in dict.fromkeys(rows) if row not in self._kept]:
            pixels = self._reader.take(missing).float() / 255
            # Each alone: what one becomes depends neither on its batch nor on where a run was resumed.
            for row, one in zip(missing, pixels.split(1), strict=True):
                fresh[row] = self._encode(row, one)[0].cpu()
                if self._bytes + fresh[row].nbytes <= _CACHE_LIMIT:
                    self._kept[row] = fresh[row]
                    self._bytes += fresh[row].nbytes
        return torch.stack([fresh[row] if row in fresh else self._kept[row] for row in rows])


class RealSamples:
    """Real samples in the network's space, each with its condition, in a keyed order.

    Args:
        known: gives them by their numbers.
        rows: for each the number of its condition.
        conditions: that these numbers count in.
        device: where batches are put.
        note: one line: what they are.
    """

    def __init__(
        self, known: Known, rows: Sequence[int], conditions: Conditions, device: torch.device | str, note: str
    ) -> None:
        self._known, self._rows, self._conditions, self._device, self.note = known, rows, conditions, device, note
        self._among: Sequence[int] = range(len(rows))

    def __len__(self) -> int:
        """How many there are, also of those that show other conditions than :meth:`only` was told."""
        return len(self._known)

    def only(self, conditions: Conditions, rows: Sequence[int], part: Conditions) -> RealSamples:
        """Those that show some of a run's conditions, which are known by their numbers in ``part`` from then on.

        Args:
            conditions: of the run.
            rows: numbers of some of them.
            part: these alone, :meth:`fewstep.data.conditions.Conditions.only`.

        Raises:
            UserError: one shows nothing that the run generates, or none shows one of these.
        """
        places = {row: place for place, row in enumerate(rows)}
        shown = self.rows_among(conditions)
        some = copy.copy(self)
        some._among = [number for number, row in enumerate(shown) if row in places]
        if not some._among:
            raise UserError(f"--data has no image of the {len(rows):,} {conditions.kind}s that are trained here")
        some._rows, some._conditions = [places.get(row, -1) for row in shown], part
        return some

    def batch(self, seed: int, positions: Sequence[int]) -> Real:
        """The real samples at these places of the run's endless, keyed stream."""
        numbers = self._at(seed, positions)
        drawn = self._conditions.drawn(seed, "real", positions)
        return Real(self.x0(numbers), self._conditions.select([self._rows[number] for number in numbers], drawn))

    def announce(self, seed: int, positions: Sequence[int]) -> None:
        """The places that are asked for next: what of them lies on a disk is read while the device is at work."""
        self._known.announce(self._at(seed, positions))

    def x0(self, numbers: Sequence[int]) -> Tensor:
        """The real samples with these numbers in the network's space, (B, ...), on the device."""
        return self._known.x0(numbers).to(self._device, non_blocking=True)

    def rows_among(self, conditions: Conditions) -> Sequence[int]:
        """For each the number of its condition among those of a run.

        Raises:
            UserError: one shows something else.
        """
        if self._conditions is not conditions:
            other = next(item for item in self._conditions.items() if conditions.rows([item]) is None)
            raise UserError(f"--data shows {other!r}, which is not among the prompts or classes; add it to them")
        return self._rows

    def _at(self, seed: int, positions: Sequence[int]) -> list[int]:
        return [self._among[keyed_order(seed, "real", len(self._among), position)] for position in positions]
