"""Ranges of strength in which a relative of a student's pipeline does one and the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# How far inside of a range that does not hold its end the nearest strength is named.
_INSIDE = 0.01
# People write a strength with as many digits behind the point, or fewer.
_DIGITS = 4
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
        """The strength in it that is nearest to another one, in few digits, an open end kept away from."""
        if self.holds(strength):
            return strength
        inside = min(_INSIDE, (self.high - self.low) / 2)
        if strength <= self.low:
            near, up = (self.low if self.holds_low else self.low + inside), True
        else:
            near, up = (self.high if self.holds_high else self.high - inside), False
        short = _in_digits(near, up=up)
        return short if self.holds(short) else near

    def shown_ends(self) -> tuple[float, float]:
        """Its ends in few digits, such that every strength of so many digits lies on the right side of them."""
        return _in_digits(self.low, up=self.holds_low), _in_digits(self.high, up=not self.holds_high)

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


def _in_digits(end: float, *, up: bool) -> float:
    """Rounded up or down to the digits that people write; 2/3 is neither 0.6667 nor 0.6666."""
    tens = 10**_DIGITS
    steps = round(end * tens, _DIGITS)  # what is whole but for its last bits is whole
    return (math.ceil(steps) if up else math.floor(steps)) / tens


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
