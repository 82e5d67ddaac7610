"""Ranges of strength in which a relative of a student's pipeline does one and the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# How far inside of a range that does not hold its end the nearest strength is named.
_INSIDE = 0.01
# What of an outcome fewstep.json tells.
_TOLD = ("calls", "timestep", "time", "why_not")


@dataclass(frozen=True)
class Outcome:
    """What a run at one strength does.

    Attributes:
        calls: how often the network is called.
        timestep: the first that the scheduler is passed.
        time: the same as t in (0, 1], 1 is noise.
        why_not: why the student is wrong there; None where it is right, and then the others are there.
        detail: what the pipeline itself raised; it names the strength, and so makes no other outcome.
    """

    calls: int | None = None
    timestep: float | None = None
    time: float | None = None
    why_not: str | None = None
    detail: str = field(default="", compare=False)


@dataclass(frozen=True)
class Range:
    """An outcome from one strength to another; a class without strength has one range, from 0 to 1.

    Attributes:
        low: the lower end.
        high: the upper end.
        holds_low: whether the lower end belongs to it.
        holds_high: whether the upper end does.
        outcome: what is done there.
    """

    low: float
    high: float
    holds_low: bool
    holds_high: bool
    outcome: Outcome

    def holds(self, strength: float) -> bool:
        """Whether a strength lies in it."""
        above = strength >= self.low if self.holds_low else strength > self.low
        return above and (strength <= self.high if self.holds_high else strength < self.high)

    def nearest(self, strength: float) -> float:
        """The strength in it that is nearest to another one, an open end kept away from."""
        inside = min(_INSIDE, (self.high - self.low) / 2)
        low = self.low if self.holds_low else self.low + inside
        high = self.high if self.holds_high else self.high - inside
        return round(min(max(strength, low), high), 6)

    def as_json(self) -> dict[str, Any]:
        """The row in ``fewstep.json``, its ends under ``from`` and ``to`` or, where open, ``above`` and ``below``."""
        ends = {"from" if self.holds_low else "above": self.low, "to" if self.holds_high else "below": self.high}
        told = {name: getattr(self.outcome, name) for name in _TOLD}
        return ends | {name: value for name, value in told.items() if value is not None}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Range:
        """The range of a row."""
        outcome = Outcome(**{name: row[name] for name in _TOLD if name in row})
        low, high = ("from" if "from" in row else "above"), ("to" if "to" in row else "below")
        return cls(float(row[low]), float(row[high]), "from" in row, "to" in row, outcome)


def ranges(count: int, run: Callable[[float], Outcome]) -> list[Range]:
    """The ranges of all strengths in (0, 1], at a number of steps.

    Every pipeline turns a strength into a whole number of steps by rounding ``count * strength``, one up and another
    down, so that nothing changes but at the multiples of 1 / count: these are run, and one strength between each two.

    Args:
        count: of steps.
        run: what is done at a strength.
    """
    found: list[Range] = []
    for step in range(1, count + 1):
        low, high = (step - 1) / count, step / count
        found.append(Range(low, high, False, False, run((low + high) / 2)))
        found.append(Range(high, high, True, True, run(high)))
    return _merged(found)


def nearest(rows: Sequence[Range], strength: float) -> float | None:
    """The strength nearest to another one at which the student is right; None: there is none."""
    right = [row.nearest(strength) for row in rows if row.outcome.why_not is None]
    return min(right, key=lambda other: abs(other - strength), default=None)


def at(rows: Sequence[Range], strength: float) -> Range | None:
    """The range that a strength lies in; None for one outside of (0, 1]."""
    return next((row for row in rows if row.holds(strength)), None)


def _merged(rows: Sequence[Range]) -> list[Range]:
    merged: list[Range] = []
    for row in rows:
        if merged and merged[-1].outcome == row.outcome:
            merged[-1] = replace(merged[-1], high=row.high, holds_high=row.holds_high)
        else:
            merged.append(row)
    return merged
