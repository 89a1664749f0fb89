"""Charts for the page: in percent of a drawing that it stretches to any width, with the text beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from matplotlib.ticker import LogLocator, MaxNLocator

POINTS = 400  # of a curve at most; in longer ones, neighbours are averaged
WIDE = 30  # an axis may be logarithmic if the largest value exceeds this many times the least
HOVERED = 120  # up to this many points of a curve each show their numbers


class Series(NamedTuple):
    """Values over steps (or layers); those that are not finite are left out."""

    label: str
    colour: str  # CSS
    xs: Sequence[float]
    ys: Sequence[float]
    dots: bool = False
    dashed: bool = False


class Box(NamedTuple):
    """The spread of values: quantiles from low to high, the middle one being the median."""

    label: str
    x: float
    quantiles: Sequence[float]


class Tick(NamedTuple):
    at: float  # percent
    text: str


class Dot(NamedTuple):
    x: float
    y: float
    title: str


class Line(NamedTuple):
    colour: str
    path: str
    title: str
    dashed: bool
    dots: list[Dot]
    shows_dots: bool


class DrawnBox(NamedTuple):
    x: float
    ys: list[float]  # percent from the top, one per quantile
    title: str


@dataclass
class Chart:
    """What the template draws."""

    title: str
    unit: str
    x_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line] = field(default_factory=list)
    boxes: list[DrawnBox] = field(default_factory=list)
    averaged: int = 1  # log entries per point of a line

    @property
    def widest(self) -> str:
        """The longest label of the y axis, which determines how much room they take."""
        return max((tick.text for tick in self.y_ticks), key=len, default="")


def curves(
    title: str,
    unit: str,
    series: Iterable[Series],
    *,
    from_zero: bool = False,
    log: bool = False,
    x_label: str = "step",
    labels: tuple[int, int] = (4, 4),
) -> Chart | None:
    """Draw lines (and dots) over steps; return None if there is nothing to draw.

    Args:
        from_zero: start the y axis at zero.
        labels: the approximate number of labels along x and along y.
        log: use a logarithmic y axis if the values are positive and far apart.
    """
    thinned = [_thinned(_finite(one)) for one in series]
    kept = [one for one, _ in thinned if one.xs]
    if not kept:
        return None
    ys = [y for one in kept for y in one.ys]
    log = log and 0 < WIDE * min(ys) < max(ys)
    x_scale = _Scale([x for one in kept for x in one.xs], margin=0.0)
    y_scale = _Scale([*ys, *([0.0] if from_zero else [])], log=log, from_zero=from_zero)
    averaged = max(by for _, by in thinned)
    return Chart(
        title,
        unit,
        x_label,
        x_scale.ticks(labels[0], whole=True),
        [Tick(100 - tick.at, tick.text) for tick in y_scale.ticks(labels[1])],
        lines=[_line(one, x_scale, y_scale) for one in kept],
        averaged=averaged,
    )


def boxes(title: str, spread: Sequence[Box], *, ticks: bool) -> Chart | None:
    """Draw one box per layer, without the outermost quantiles; return None if there is nothing to draw.

    Args:
        ticks: label the layers below.
    """
    spread = [box for box in spread if box.quantiles and all(map(math.isfinite, box.quantiles))]
    if not spread:
        return None
    positions = sorted({box.x for box in spread})
    slots = {x: 100 * (i + 0.5) / len(positions) for i, x in enumerate(positions)}
    y_scale = _Scale([q for box in spread for q in box.quantiles[1:-1]])
    drawn = [DrawnBox(slots[box.x], [round(100 - y_scale(q), 2) for q in box.quantiles], box.label) for box in spread]
    every = -(-len(positions) // 8)
    x_ticks = [Tick(slots[x], f"{x:g}") for x in positions[::every]] if ticks else []
    y_ticks = [Tick(100 - tick.at, tick.text) for tick in y_scale.ticks(4)]
    return Chart(title, "", "", x_ticks, y_ticks, boxes=drawn)


def number(x: float) -> str:
    """Format a number for an axis: 20k, 1,200, 0.25, 5e-05."""
    text = f"{x / 1000:g}k" if 1e4 <= abs(x) < 1e6 else f"{float(f'{x:.6g}'):,g}" if abs(x) < 1e4 else f"{x:.3g}"
    return text.replace("-", "−")


class _Scale:
    """Maps values to percent of the drawing."""

    def __init__(
        self, values: Sequence[float], *, log: bool = False, from_zero: bool = False, margin: float = 0.05
    ) -> None:
        self.log = log
        low, high = (math.log10(x) if log else x for x in (min(values), max(values)))
        if high - low <= 1e-9 * max(abs(high), abs(low)):  # one value, or all alike
            around = 0.5 * abs(high) or 1.0
            low, high = low - (0 if from_zero else around), high + around
        self.low = low if from_zero and low >= 0 else low - margin * (high - low)
        self.high = high + margin * (high - low)

    def __call__(self, value: float) -> float:
        x = math.log10(value) if self.log else value
        return 100 * (x - self.low) / (self.high - self.low)

    def ticks(self, count: int, whole: bool = False) -> list[Tick]:
        if self.log:
            values = LogLocator(numticks=count + 1).tick_values(10**self.low, 10**self.high)
        else:
            values = MaxNLocator(count, integer=whole, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        inside = [(float(x), self(x)) for x in values if x > 0 or not self.log]
        return [Tick(round(at, 2), number(x)) for x, at in inside if -1e-6 <= at <= 100 + 1e-6]


def _line(one: Series, x_scale: _Scale, y_scale: _Scale) -> Line:
    places = [(round(x_scale(x), 2), round(100 - y_scale(y), 2)) for x, y in zip(one.xs, one.ys, strict=True)]
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
    dots = []
    if one.dots or len(places) <= HOVERED:
        texts = [f"{one.label}, {x:g}: {_exact(y)}" for x, y in zip(one.xs, one.ys, strict=True)]
        dots = [Dot(x, y, text) for (x, y), text in zip(places, texts, strict=True)]
    shows_dots = one.dots or len(places) == 1  # a line of one point is invisible
    return Line(one.colour, path, f"{one.label}, ends at {_exact(one.ys[-1])}", one.dashed, dots, shows_dots)


def _exact(y: float) -> str:
    return f"{y:,.0f}" if abs(y) >= 1000 else f"{y:.4g}"


def _finite(one: Series) -> Series:
    pairs = [(x, y) for x, y in zip(one.xs, one.ys, strict=True) if math.isfinite(y)]
    return one._replace(xs=[x for x, _ in pairs], ys=[y for _, y in pairs])


def _thinned(one: Series) -> tuple[Series, int]:
    """Reduce a line to at most `POINTS` points; return it with the number of values averaged into each."""
    by = -(-len(one.xs) // POINTS) or 1
    if one.dots or by == 1:
        return one, 1

    def means(values: Sequence[float]) -> list[float]:
        groups = [values[i : i + by] for i in range(0, len(values), by)]
        return [sum(group) / len(group) for group in groups]

    return one._replace(xs=means(one.xs), ys=means(one.ys)), by
