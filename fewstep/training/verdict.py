"""Is it working? What the numbers of a run say, in plain words; thresholds are those of docs/working.md.

Everything here is a function of the lines of ``metrics.jsonl`` in their order, so that a run, a resumed run and
``fewstep verdict`` come to the same words.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from fewstep.errors import UserError
from fewstep.reading import parse_json

#: Samples are constant, or alike, where the spread within them, or between them, is below this share of the teacher's.
CONSTANT = 0.1
#: Samples whose standard deviation is above this multiple of the teacher's are far out.
FAR_OUT = 2.0
#: In so many successive grids, and no better in the last than in the first: a student may begin as any of these.
GRIDS = 2
#: A critic's loss, or a gradient, explodes when its level is above this multiple of the lowest that it had.
EXPLODED = {"denoising": 10.0, "gradient_norm": 100.0}
#: Before an explosion all was well as long as the numbers came down to this multiple of that level.
CALM = 2.0
#: A level is the median of so many successive numbers, and it is compared with those of so many.
RECENT, REMEMBERED = 5, 60
#: A critic whose lag is on average (the median of twice as many) above this is far worse than the teacher.
LAGGING = 2.0
#: What stands still differs by less than this share of itself.
STILL = 1e-6
#: Samples that are the same in so many successive grids stand still.
STILL_GRIDS = 3

#: Beside a reward: what is not optimised has fallen when its level is below its highest by this multiple of the noise
#: between two looks, and diversity when it is also below this share of it.
FALLEN, LESS_DIVERSE = 3.0, 0.9
#: The median distance of two draws of a normal law, in its standard deviations.
_APART = 0.954

_GRID = ("std", "within", "between")


@dataclass(frozen=True)
class Trouble:
    """Something that is wrong with a run.

    Attributes:
        kind: "nan", "constant", "alike", "far out", "explosion", "standstill", "lagging" or "deceived".
        what: the numbers that show it.
        since: the first step whose numbers do.
        good: the last step before it whose numbers did not; 0 where there is none.
        words: in one line.
    """

    kind: str
    what: str
    since: int
    good: int
    words: str


class History:
    """The latest numbers of a run by name: as many as a verdict looks at.

    Attributes:
        varied: how the student's samples have ever varied enough not to be constant: "within", "between".
    """

    def __init__(self, rows: Iterable[Mapping[str, float]] = ()) -> None:
        self._values: dict[str, deque[tuple[int, float]]] = {}
        self.varied: set[str] = set()
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, float]) -> None:
        """A line of the log."""
        for name, value in row.items():
            if name not in ("step", "seconds"):
                kept = self._values.setdefault(name, deque(maxlen=REMEMBERED))
                kept.append((int(row["step"]), value))
        for what in ("within", "between"):
            ours, theirs = (row.get(f"samples/{who}_{what}", 0.0) for who in ("student", "teacher"))
            if theirs > 0 and ours >= CONSTANT * theirs:
                self.varied.add(what)

    @property
    def has_critic(self) -> bool:
        """Whether the method has a critic."""
        return any(name.endswith("/denoising") for name in self._values)

    def names(self) -> list[str]:
        """Of all numbers, sorted."""
        return sorted(self._values)

    def last(self, name: str, count: int) -> list[tuple[int, float]]:
        """The last ``count`` or fewer (step, number), in their order."""
        return list(self._values.get(name, ()))[-count:]

    def before(self, name: str, step: int) -> int:
        """The last step before this one with such a number; 0 where there is none."""
        return max((at for at, _ in self._values.get(name, ()) if at < step), default=0)


def troubles(history: History) -> list[Trouble]:
    """What is wrong at the end of a history."""
    looked_at = (_not_numbers, _samples, _explosions, _lessons, _deceptions)
    return [trouble for look in looked_at for trouble in look(history)]


def judged(rows: Iterable[Mapping[str, float]]) -> list[tuple[Trouble, int | None]]:
    """Whatever was wrong in the course of a log, in its order, and from which step on it no longer was."""
    history = History()
    found: list[tuple[Trouble, int | None]] = []
    going: dict[tuple[str, str], int] = {}  # places in what was found
    for row in rows:
        history.add(row)
        now = {(one.kind, one.what): one for one in troubles(history)}
        for key in [key for key in going if key not in now]:
            place = going.pop(key)
            found[place] = (found[place][0], int(row["step"]))
        for key, one in now.items():
            if key not in going:
                going[key] = len(found)
                found.append((one, None))
    return found


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; one that a kill cut short is left out.

    Raises:
        UserError: there is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the folder of a run") from error
    rows = []
    for line in text.split("\n"):
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _not_numbers(history: History) -> list[Trouble]:
    """Distribution matching passes over what is not finite in a sample; the log shows it all the same."""
    found = []
    for name in history.names():
        ((step, value),) = history.last(name, 1)
        if not math.isfinite(value) and not name.endswith("/lag"):  # a ratio, whose teacher may be without error
            words = f"{name} is {value} in step {step}, and not a finite number"
            found.append(Trouble("nan", name, step, history.before(name, step), words))
    return found


def _samples(history: History) -> list[Trouble]:
    """What is wrong with the student's samples, beside the teacher's of the same noise."""
    spread = {what: _both(history, what, GRIDS) for what in _GRID}
    found = []
    for what, kind, words in (
        ("within", "constant", "each sample of the student is nearly of one colour: within it the spread is"),
        ("between", "alike", "the student's samples are nearly all alike: the spread between them is"),
    ):
        # Without a critic it learns given ends, and may stay as blurred as it began for a long time before it does.
        if not history.has_critic and what not in history.varied:
            continue
        ratios = [(step, ours / theirs) for step, ours, theirs in spread[what] if theirs > 0]
        if len(ratios) == GRIDS and all(r < CONSTANT for _, r in ratios) and ratios[-1][1] <= ratios[0][1]:
            found.append(_of_grids(history, kind, words, spread[what]))
    ratios = [(step, ours / theirs) for step, ours, theirs in spread["std"] if theirs > 0]
    if len(ratios) == GRIDS and all(r > FAR_OUT for _, r in ratios) and ratios[-1][1] >= ratios[0][1]:
        words = "the student's samples are over-saturated: their standard deviation is"
        found.append(_of_grids(history, "far out", words, spread["std"]))
    return found


def _both(history: History, what: str, count: int) -> list[tuple[int, float, float]]:
    """(step, the student's spread, the teacher's) of the last grids, where both are finite."""
    ours = history.last(f"samples/student_{what}", count)
    theirs = dict(history.last(f"samples/teacher_{what}", count))
    both = [(step, value, theirs[step]) for step, value in ours if step in theirs]
    return [(step, a, b) for step, a, b in both if math.isfinite(a) and math.isfinite(b)]


def _of_grids(history: History, kind: str, words: str, grids: Sequence[tuple[int, float, float]]) -> Trouble:
    since, (_, ours, theirs) = grids[0][0], grids[-1]
    words = f"since step {since} {words} {ours:.3g}, the teacher's {theirs:.3g}"
    return Trouble(kind, "samples", since, history.before("samples/student_std", since), words)


def _explosions(history: History) -> list[Trouble]:
    """A critic that gets far worse, or gradients that get far larger, than they once were."""
    found = []
    names = history.names()
    has_critic = history.has_critic
    for name in names:
        role, _, what = name.rpartition("/")
        # Where there is a critic the student's gradient begins at nothing: critic and teacher say the same.
        if what not in EXPLODED or (has_critic and role == "student"):
            continue
        values = history.last(name, REMEMBERED)
        if len(values) < 2 * RECENT:
            continue
        levels = [median(v for _, v in values[k : k + RECENT]) for k in range(len(values) - RECENT + 1)]
        lowest, now = min(levels[:-RECENT]), levels[-1]
        if lowest > 0 and now > EXPLODED[what] * lowest:
            since = next(step for step, value in values[-RECENT:] if value > EXPLODED[what] * lowest)
            words = f"since step {since} {name} explodes: it is about {now:.3g}, and was about {lowest:.3g}"
            good = max((step for step, value in values if step < since and value <= CALM * lowest), default=0)
            found.append(Trouble("explosion", name, since, good, words))
    return found


def _deceptions(history: History) -> list[Trouble]:
    """Rewards that are won at the cost of what is not rewarded: another metric, or the samples' diversity."""
    found = []
    for name in history.names():
        role, _, what = name.rpartition("/")
        if what != "pair_diversity" and not what.startswith("unrewarded_"):
            continue
        values = history.last(name, REMEMBERED)
        if len(values) < 2 * RECENT:
            continue
        levels = [median(v for _, v in values[k : k + RECENT]) for k in range(len(values) - RECENT + 1)]
        highest, now = max(levels[:-RECENT]), levels[-1]
        noise = median(abs(b - a) for (_, a), (_, b) in pairwise(values)) / _APART
        if highest - now > FALLEN * noise and (what != "pair_diversity" or now < LESS_DIVERSE * highest):
            since = values[-RECENT][0]
            words = f"since step {since} the {role} is rewarded at the cost of what is not: {name} is about {now:.3g}, "
            words += f"and was about {highest:.3g}"
            found.append(Trouble("deceived", name, since, history.before(name, since), words))
    return found


def _lessons(history: History) -> list[Trouble]:
    """Who learns nothing, or too slowly."""
    found = []
    for name in history.names():
        role, _, what = name.rpartition("/")
        values = history.last(name, RECENT)
        since = values[0][0]
        if len(values) < RECENT:
            continue
        if what == "gradient_norm" and all(value == 0 for _, value in values):
            words = f"since step {since} the {role} learns nothing: its gradient is zero"
            found.append(Trouble("standstill", role, since, history.before(name, since), words))
        lately = [value for _, value in history.last(name, 2 * RECENT)]
        if what == "lag" and len(lately) == 2 * RECENT and median(lately) > LAGGING:
            words = f"since step {since} the {role} does not follow: of the student's samples it knows less than the "
            words += f"teacher, {name} is about {median(lately):.3g}"
            found.append(Trouble("lagging", role, since, history.before(name, since), words))
        if what == "lag" and all(abs(value - 1) < STILL for _, value in values):
            words = f"since step {since} the {role} stands still: it says what the teacher says, {name} is 1"
            found.append(Trouble("standstill", role, since, history.before(name, since), words))
    grids = [history.last(f"samples/{name}", STILL_GRIDS) for name in ("student_std", "student_between", "apart")]
    if all(len(grid) == STILL_GRIDS and _still([value for _, value in grid]) for grid in grids):
        since = grids[0][0][0]
        words = f"since step {since} the student stands still: its samples are the same in {STILL_GRIDS} grids"
        found.append(Trouble("standstill", "samples", since, history.before("samples/apart", since), words))
    return found


def _still(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= STILL * max(abs(value) for value in values)
