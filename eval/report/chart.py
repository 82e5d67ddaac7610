"""A chart of one number against the cost of a sample: where everything lies, in pixels; the page draws it as SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fewstep.eval.report.content import Content
from fewstep.eval.report.table import Row, plain

WIDTH, HEIGHT = 420, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 410, 14, 268
LETTER = 7.6  # of 13 pixels, on average
LINE = 15.0
MARKER = 5.0
MOST_TICKS = 7
#: Ratio of the largest to the smallest number from which a logarithmic axis shows more.
LOGARITHMIC = 8.0
#: What is larger is not drawn: nothing of the kind is measured, and axes around it would overflow.
LARGEST = 1e100

Box = tuple[float, float, float, float]
#: Where a label may stand beside its point, best first: offsets in pixels and which end of the text is meant.
_PLACES = (
    (9, 4, "start"),
    (0, -10, "middle"),
    (0, 20, "middle"),
    (-9, 4, "end"),
    (8, -8, "start"),
    (8, 16, "start"),
    (-8, -8, "end"),
    (-8, 16, "end"),
)


@dataclass(frozen=True)
class Label:
    """A text at (x, y) of its base line; anchor: "start", "middle" or "end"."""

    text: str
    x: float
    y: float
    anchor: str = "start"

    @property
    def box(self) -> Box:
        """Left, top, right and bottom of it, roughly."""
        width = LETTER * len(self.text)
        left = self.x - {"start": 0.0, "middle": width / 2, "end": width}[self.anchor]
        return left, self.y - LINE + 3, left + width, self.y + 3


@dataclass(frozen=True)
class Point:
    """One row: where it lies, the ends of its error bar if it has one, and what is said of it."""

    x: float
    y: float
    bar: tuple[float, float] | None
    about: str
    label: Label | None


@dataclass(frozen=True)
class Series:
    """The rows of one model, from the cheapest on."""

    name: str
    number: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Chart:
    """Everything that is drawn. x_ticks, y_ticks: labels on the axes. floor: of the measure, as the y of a line."""

    title: str
    x_title: str
    y_title: str
    x_ticks: tuple[Label, ...]
    y_ticks: tuple[Label, ...]
    series: tuple[Series, ...]
    floor: float | None
    floor_label: Label | None


@dataclass(frozen=True)
class Axis:
    """From numbers to pixels."""

    low: float
    high: float
    first: float
    last: float
    logarithmic: bool

    def at(self, value: float) -> float:
        """The pixel of a number."""
        low, high, value = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return round(self.first + (self.last - self.first) * (value - low) / (high - low), 1)

    def ticks(self) -> list[float]:
        """Round numbers within it, at most `MOST_TICKS`."""
        if not self.logarithmic:
            step = _round_up((self.high - self.low) / (MOST_TICKS - 1))
            return [step * k for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        for digits in ((1, 2, 5), (1, 3), (1,)):
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [d * 10.0**p for p in powers for d in digits if self.low <= d * 10.0**p <= self.high]
            if len(found) <= MOST_TICKS:
                return found
        return found[:: math.ceil(len(found) / MOST_TICKS)]


def charts(report: Content, name: str) -> Iterator[Chart]:
    """The measure `name` against the network evaluations of a sample, and against the latency where it is known."""
    yield from _chart(report, name, "network evaluations per sample", lambda row: float(row["nfe"]))
    clocks = {row.get("report") for row in report.rows if row["speed"]}
    if len(clocks) == 1:
        yield from _chart(report, name, "latency of one sample, ms", lambda row: (row["speed"] or {}).get("latency_ms"))
    else:  # milliseconds of several reports were not measured side by side
        words = "latency over that of the own report's teacher"
        yield from _chart(report, name, words, _relative_latency)


def _relative_latency(row: Row) -> float | None:
    ratio = (row["speed"] or {}).get("latency_ratio")
    return 1 / ratio if ratio else None


def _chart(report: Content, name: str, x_title: str, cost: Callable[[Row], float | None]) -> Iterator[Chart]:
    measure = report.measures[name]
    rows = [
        (row, x)
        for row in report.rows
        if name in row["metrics"] and (x := cost(row)) is not None and 1 / LARGEST < x < LARGEST
        if abs(row["metrics"][name]) < LARGEST
    ]
    if not rows:
        return
    values = [row["metrics"][name] for row, _ in rows]
    spreads = [min(row["spread"].get(name, 0.0), LARGEST) for row, _ in rows]
    low, high = min(v - s for v, s in zip(values, spreads)), max(v + s for v, s in zip(values, spreads))
    best = measure.floor if measure.floor is not None and abs(measure.floor) < LARGEST else None
    shown = (low, high) if best is None else (min(low, best), max(high, best))
    x_axis, y_axis = _x_axis([x for _, x in rows]), _y_axis(*shown)

    floor = None if best is None else y_axis.at(best)
    floor_label = None
    ways = {}
    for model in dict.fromkeys(row["model"] for row, _ in rows):
        own = sorted((one for one in rows if one[0]["model"] == model), key=lambda one: one[1])
        ways[model] = [(x_axis.at(x), y_axis.at(row["metrics"][name])) for row, x in own]
    taken = [box for way in ways.values() for box in _drawn(way)]
    if best is not None and floor is not None:
        text = f"floor {measure.printed(best)}"
        floor_label = _place(text, [(RIGHT - 4, floor - 4, "end"), (LEFT + 4, floor - 4, "start")], taken)
        taken += [] if floor_label is None else [floor_label.box]
    series = []
    for number, model in enumerate(dict.fromkeys(row["model"] for row in report.rows)):
        points = []
        for row, x in sorted((one for one in rows if one[0]["model"] == model), key=lambda one: one[1]):
            value, spread = row["metrics"][name], row["spread"].get(name)
            px, py = x_axis.at(x), y_axis.at(value)
            text = str(row["steps"])
            label = _place(text, [(px + dx, py + dy, anchor) for dx, dy, anchor in _PLACES], taken)
            taken += [] if label is None else [label.box]
            about = f"{plain(model)}, {row['steps']} step{'s' * (row['steps'] != 1)}: "
            about += f"{measure.title} {measure.printed(value, spread)} at {x:.4g} {x_title}"
            bar = None if spread is None else (y_axis.at(value - spread), y_axis.at(value + spread))
            points.append(Point(px, py, bar, about, label))
        series += [Series(plain(model), number, tuple(points))] if points else []
    words = {"lower": ", lower is better", "higher": ", higher is better"}.get(measure.better or "", "")
    yield Chart(
        title=f"{measure.title} against {x_title}",
        x_title=x_title,
        y_title=measure.heading + words,
        x_ticks=tuple(Label(f"{tick:g}", x_axis.at(tick), BOTTOM + 18, "middle") for tick in x_axis.ticks()),
        y_ticks=tuple(Label(f"{tick:.6g}", LEFT - 8, y_axis.at(tick) + 4, "end") for tick in y_axis.ticks()),
        series=tuple(series),
        floor=floor,
        floor_label=floor_label,
    )


def _x_axis(values: Sequence[float]) -> Axis:
    """Logarithmic, with room for labels at both ends."""
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.1, 1.35)
    return Axis(low / margin, high * margin, LEFT, RIGHT, logarithmic=True)


def _y_axis(low: float, high: float) -> Axis:
    """Upwards; logarithmic where the numbers are of several magnitudes."""
    if low > 0 and high / low > LOGARITHMIC:
        margin = (high / low) ** 0.08
        return Axis(low / margin, high * margin, BOTTOM, TOP, logarithmic=True)
    margin = (high - low) * 0.1 or abs(high) * 0.1 or 1.0
    return Axis(low - margin, high + margin, BOTTOM, TOP, logarithmic=False)


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= value * (1 - 1e-9))


def _drawn(way: Sequence[tuple[float, float]]) -> Iterator[Box]:
    """What the marks of a series cover, and the lines between them, in small pieces."""
    yield from (_around(x, y, MARKER) for x, y in way)
    for (x, y), (to_x, to_y) in itertools.pairwise(way):
        pieces = max(1, round(math.dist((x, y), (to_x, to_y)) / 4))
        for k in range(1, pieces):
            yield _around(x + (to_x - x) * k / pieces, y + (to_y - y) * k / pieces, 1.5)


def _around(x: float, y: float, far: float) -> Box:
    return x - far, y - far, x + far, y + far


def _place(text: str, places: Sequence[tuple[float, float, str]], taken: Sequence[Box]) -> Label | None:
    """The first place inside the chart where a text covers nothing, or None: a point's own words are still shown."""
    for x, y, anchor in places:
        label = Label(text, round(x, 1), round(y, 1), anchor)
        left, top, right, bottom = label.box
        inside = left >= LEFT and right <= WIDTH and top >= 0 and bottom <= BOTTOM
        if inside and not any(left < r and right > l and top < b and bottom > t for l, t, r, b in taken):  # noqa: E741
            return label
    return None
