"""Both ends of a step at signed times, by the part of the batch that a sample belongs to (TwinFlow)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.draws import Draws
from fewstep.diffusion.placed_times import spread_places
from fewstep.sending import sent

#: What a part of the batch learns:
#:
#: - e2e: the whole path, t the noisiest time and r = 0
#: - one: from any t to r = 0
#: - any: from any t to any r
#: - mul: from any t to an r close by
#: - flow: the velocity itself, r = t
#: - adv: the twin's velocity, at -t
PARTS = ("e2e", "one", "any", "mul", "flow", "adv")
#: Those of positive times.
BASE_PARTS = PARTS[:-1]


class SignedTimes(NamedTuple):
    """Flow times of B samples, as the host knows them.

    Attributes:
        t: in (0, 1], without its sign.
        r: in [0, t].
        part: of :data:`PARTS`.
    """

    t: list[float]
    r: list[float]
    part: list[str]

    def rows(self, *parts: str) -> list[int]:
        """The rows of these parts, ascending."""
        return [row for row, part in enumerate(self.part) if part in parts]

    def on(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """t and r (B,), float64, without their signs."""
        return sent(self.t, device, torch.float64), sent(self.r, device, torch.float64)


@dataclass(frozen=True)
class BatchParts:
    """Splits a step's batch in equal parts, by place and so the same in every run, and draws the times of each.

    Neighbours are of different parts, so that micro-batches and processes have about the same share of each.

    Attributes:
        parts: of :data:`PARTS`; one that stands here twice has twice the share.
        low: lowest flow time of t; what is drawn of r below it becomes 0, the clean sample.
        high: the noisiest flow time, at which sampling starts.
        mul_fraction: how far from t the r of ``mul`` is at most, as a share of t.
    """

    parts: tuple[str, ...]
    low: float
    high: float
    mul_fraction: float = 0.05

    def share(self, parts: Sequence[str], total: int) -> float:
        """Of steps' batches of ``total``, that of these parts together."""
        places = max(total, len(self.parts))  # of fewer samples than parts, over the steps in which all have a turn
        return sum(self.at(place, places, 0) in parts for place in range(places)) / places

    def at(self, place: int, total: int, step: int) -> str:
        """The part of a place in the batch of ``total`` of a step; parts take turns where there are fewer places."""
        if total < len(self.parts):
            return self.parts[(step * total + place) % len(self.parts)]
        return self.parts[place * len(self.parts) // total]

    def draw(self, draws: Draws, total: int) -> SignedTimes:
        """The times of the samples that ``draws`` are for, from the draws ``t``, ``any`` and ``mul``."""
        places = spread_places(total)
        part = [self.at(places[index], total, draws.step) for index in draws.indices]
        times, wide, close = (draws.numbers(name) for name in ("t", "any", "mul"))
        t = [
            self.high if kind == "e2e" else min(max(time, self.low), self.high)
            for kind, time in zip(part, times, strict=True)
        ]
        r = [
            {"e2e": 0.0, "one": 0.0, "any": s * (1 - far), "mul": s * (1 - self.mul_fraction * near)}.get(kind, s)
            for kind, s, far, near in zip(part, t, wide, close, strict=True)
        ]
        return SignedTimes(t, [0.0 if end < self.low else end for end in r], part)
