"""The choice of ``fewstep distill auto``: what was measured of each method, and which of them is taken.

``best_methods.json`` beside this file holds what was measured. ``make methods`` writes it from the same results as the
table of all methods, so that a new cell is taken up when it is run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from typing import Any

from fewstep.teachers.kind import Kind

#: Of this package.
FILE = "best_methods.json"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One measured student at one step count.

    Attributes:
        kind: of its teacher.
        steps: it was measured at.
        method: a file name of ``fewstep.trainers``.
        images: whether it was trained on real images.
        fd: median over the seeds.
        lowest: of the seeds.
        highest: of the seeds.
        over: ``fd`` over that of the teacher at its most steps.
        seeds: how many.
        passes: what its training cost, in forward passes of one sample.
        cell: the result in eval/results.
        teacher: an embedded one.
        teacher_steps: its most steps.
        settings: of the run, where they are not the method's defaults; steps, seed and what is of a machine apart.
    """

    kind: Kind
    steps: int
    method: str
    images: bool
    fd: float
    lowest: float
    highest: float
    over: float
    seeds: int
    passes: int
    cell: str
    teacher: str
    teacher_steps: int
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Evidence:
    """All that is known.

    Attributes:
        spread: how many times higher the highest of several seeds is than the lowest, in the median candidate that has
            several; it stands in for the spread of a candidate of one seed.
        candidates: in any order.
    """

    spread: float
    candidates: tuple[Candidate, ...]

    def text(self) -> str:
        """As a file: one line for each candidate, so that a change is read easily."""
        lines = ",\n  ".join(json.dumps(asdict(one)) for one in self.candidates)
        return f'{{\n "spread": {self.spread},\n "candidates": [\n  {lines}\n ]\n}}\n'

    def ends(self, one: Candidate) -> tuple[float, float]:
        """The lowest and the highest FD that a candidate has to be expected to have."""
        if one.seeds > 1:
            return one.lowest, one.highest
        return one.fd / math.sqrt(self.spread), one.fd * math.sqrt(self.spread)

    def preferred(self, candidates: Sequence[Candidate]) -> Candidate:
        """The one with the lowest FD; of those whose seeds reach into its own, the one that is cheapest to train."""
        best = min(candidates, key=lambda one: one.fd)
        alike = [one for one in candidates if self.ends(one)[0] <= self.ends(best)[1]]
        return min(alike, key=lambda one: (one.passes, one.fd))

    def in_order(self, kind: Kind, steps: int, images: bool) -> list[Candidate]:
        """What to take, and what next where that does not take the run's other settings; empty: nothing is known.

        Between two measured step counts the larger counts, beyond the largest that one.

        Args:
            kind: of the teacher; nothing was measured of EDM, whose networks know every time, as those of flows do.
            steps: that the student is to need.
            images: whether there are real images.
        """
        like = "flow" if kind == "edm" else kind
        known = [one for one in self.candidates if one.kind == like and (images or not one.images)]
        counts = {one.steps for one in known}
        count = min((n for n in counts if n >= steps), default=max(counts, default=0))
        left, order = [one for one in known if one.steps == count], []
        while left:
            order.append(self.preferred(left))
            left.remove(order[-1])
        return order


def shipped_evidence() -> Evidence:
    """That of the file in this package."""
    content = json.loads((files("fewstep.programs") / FILE).read_text(encoding="utf-8"))
    return Evidence(content["spread"], tuple(Candidate(**one) for one in content["candidates"]))


def choices(config_class: type, shared: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a recipe's settings those that say which form of a method it is: words, switches, what is turned on or off.

    Rates, sizes, lengths and times were chosen for networks of a few million parameters, and stay with them.

    Args:
        config_class: the method's settings.
        shared: those of every method, whose numbers are all of that kind.
        settings: that differ from the defaults.
    """
    defaults = {one.name: one.default for one in fields(config_class)}
    every = {one.name for one in fields(shared)}

    def is_switched(name: str, value: Any) -> bool:
        """A number that was 0 and is not, or the other way round."""
        pair = (defaults.get(name), value)
        return name not in every and None not in pair and sum(one == 0 for one in pair) == 1

    return {
        name: value for name, value in settings.items() if isinstance(value, str | bool) or is_switched(name, value)
    }
