"""Lines and bars as shapes on a canvas of fixed size, which the page draws as SVG in its own colours.

Owns scales, ticks and thinning; knows no figure's meaning and writes no markup.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

WIDTH, HEIGHT = 420.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 10.0, 10.0, 34.0
TICKS: Final = 5
POINTS_MOST: Final = 400
"""Of a line: more than a screen shows apart."""

Series = Sequence[tuple[float, float | None]]
Scale = Callable[[float], float]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """Points joined, or each for itself."""

    label: str
    points: list[tuple[float, float]]
    path: str


@dataclass(frozen=True)
class Bar:
    """A column from the bottom."""

    x: float
    y: float
    width: float
    height: float
    says: str


@dataclass(frozen=True)
class Chart:
    """What is to be drawn."""

    title: str
    x_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: tuple[Line, ...] = ()
    bars: tuple[Bar, ...] = ()
    dots: bool = False
    """Whether the lines' points are marked."""


def line_chart(
    title: str,
    x_label: str,
    series: Sequence[tuple[str, Series]],
    *,
    log_x: bool = False,
    log_y: bool = False,
    dots: bool = False,
) -> Chart | None:
    """Lines over one another; `None` if there is no point. Points of which a coordinate is no number are left out."""
    named = [(label, thinned(_finite(points, log_x=log_x, log_y=log_y))) for label, points in series]
    named = [(label, points) for label, points in named if points]
    if not named:
        return None
    xs, ys = ([point[axis] for _, points in named for point in points] for axis in (0, 1))
    x_scale, x_ticks = _axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, log=log_x)
    low = min(ys) if log_y or min(ys) < 0 else 0.0
    y_scale, y_ticks = _axis(low, max(ys), HEIGHT - BOTTOM, TOP, log=log_y)
    lines = tuple(_line(label, [(x_scale(x), y_scale(y)) for x, y in points]) for label, points in named)
    return Chart(title, x_label, x_ticks, y_ticks, lines, dots=dots)


def bar_chart(title: str, x_label: str, labels: Sequence[str], counts: Sequence[int], *, every: int = 1) -> Chart:
    """A bar a count; every so many have their label below."""
    scale, y_ticks = _axis(0.0, float(max(1, *counts)), HEIGHT - BOTTOM, TOP, log=False)
    step = (WIDTH - LEFT - RIGHT) / len(counts)
    bars = tuple(
        Bar(LEFT + place * step + 1, scale(count), step - 2, HEIGHT - BOTTOM - scale(count), f"{label}: {count:,}")
        for place, (label, count) in enumerate(zip(labels, counts, strict=True))
    )
    x_ticks = [Tick(LEFT + (place + 0.5) * step, label) for place, label in enumerate(labels) if not place % every]
    return Chart(title, x_label, x_ticks, y_ticks, bars=bars)


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Evenly spread ones of them, first and last among these."""
    if len(points) <= POINTS_MOST:
        return points
    return [points[place * (len(points) - 1) // (POINTS_MOST - 1)] for place in range(POINTS_MOST)]


def number(value: float) -> str:
    """Short, for an axis."""
    for least, divisor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / divisor:.4g}{unit}"
    return f"{value:.4g}"


def _finite(points: Series, *, log_x: bool, log_y: bool) -> list[tuple[float, float]]:
    return [
        (x, y)
        for x, y in points
        if y is not None and math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)
    ]


def _line(label: str, points: list[tuple[float, float]]) -> Line:
    points = [(round(x, 1), round(y, 1)) for x, y in points]
    return Line(label, points, " ".join(f"{x},{y}" for x, y in points))


def _axis(low: float, high: float, begin: float, end: float, *, log: bool) -> tuple[Scale, list[Tick]]:
    """From values to the canvas, and marks at round values."""
    if log:
        scale, marks = _log_marks(low, high)
    else:
        scale, marks = float, _round_marks(low, high)
    low, high = min(scale(low), scale(marks[0])), max(scale(high), scale(marks[-1]))
    span = high - low or 1.0

    def placed(value: float) -> float:
        return begin + (scale(value) - low) / span * (end - begin)

    return placed, [Tick(round(placed(mark), 1), number(mark)) for mark in marks]


def _round_marks(low: float, high: float) -> list[float]:
    """At one, two or five times a power of ten, around all values."""
    rough = (high - low) / TICKS or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [mark * step for mark in range(first, max(last, first + 1) + 1)]


def _log_marks(low: float, high: float) -> tuple[Scale, list[float]]:
    """At powers of ten, where there are two of them; else at one, two and five times these."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > 2:
        every = max(1, -(-(last - first) // (2 * TICKS)))
        return math.log10, [10.0**power for power in range(first, last + 1, every)]
    marks = [10.0**power * factor for power in range(first, last + 1) for factor in (1, 2, 5)]
    inside = [mark for mark in marks if low / 2.5 <= mark <= high * 2.5]
    return math.log10, inside or [low, high]
