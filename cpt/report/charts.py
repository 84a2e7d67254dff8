"""Charts as numbers: paths in a box of 1000 × 1000, ticks in percent. The page draws lines as SVG that stretches with
the window, and writes all text as HTML over it, so that letters keep their size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from cpt.base.units import show_count

Point = tuple[float, float]
BOX = 1000.0
MOST_POINTS = 500  # of a line; more are averaged, with a band from the lowest to the highest
NUM_COLOURS = 8


@dataclass(frozen=True, kw_only=True)
class Series:
    """Values to draw over tokens. A gap between two pieces of a line is a new piece."""

    label: str
    colour: int
    pieces: Sequence[Sequence[Point]]
    dots: bool = False  # mark every point
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """A series in the box."""

    label: str
    colour: int
    path: str
    band: str
    dots: Sequence[Point]  # [percent from the left, percent from the top]
    dashed: bool


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A label at an axis."""

    at: float  # [percent]
    label: str


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stage along the x axis."""

    label: str
    left: float  # [percent]
    width: float  # [percent]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Everything the page needs to draw one chart."""

    title: str
    unit: str
    lines: Sequence[Line]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    spans: Sequence[Span]
    caption: str = ""
    described: str = field(default="")  # for those who cannot see it


def chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    stages: Sequence[tuple[str, float, float]],
    *,
    top: float | None = None,
    from_zero: bool = False,
    caption: str = "",
) -> Chart | None:
    """A chart over the stages of a run, or None when there is nothing to draw.

    Args:
        stages: (name, first, last) of each stage along the x axis [tokens].
        top: values above it run out of the picture; without it nothing does.
        from_zero: the y axis begins at 0.
    """
    values = [y for s in series for piece in s.pieces for _, y in piece if math.isfinite(y)]
    if not values or not stages:
        return None
    left, right = stages[0][1], max(stages[-1][2], stages[0][1] + 1)
    ticks = nice_ticks(0.0 if from_zero else min(values), min(max(values), top) if top is not None else max(values))
    low, high = ticks[0], ticks[-1]

    def place(point: Point) -> Point:
        x, y = point
        return (x - left) / (right - left) * BOX, (high - y) / (high - low) * BOX

    lines = [_line(s, place) for s in series if any(s.pieces)]
    digits = tick_digits(ticks)
    last = [f"{s.label} ends at {s.pieces[-1][-1][1]:.4g}" for s in series if s.pieces and s.pieces[-1]]
    return Chart(
        title=title,
        unit=unit,
        lines=lines,
        x_ticks=[
            Tick(at=100 * (t - left) / (right - left), label=show_count(t))
            for t in nice_ticks(left, right)
            if t <= right
        ],
        y_ticks=[Tick(at=100 * (high - t) / (high - low), label=tick_label(t, digits)) for t in ticks],
        spans=[
            Span(label=name, left=100 * (a - left) / (right - left), width=100 * (b - a) / (right - left))
            for name, a, b in stages
        ],
        caption=caption,
        described=f"{title} [{unit}] from {low:g} to {high:g}; " + "; ".join(last),
    )


def _line(series: Series, place: object) -> Line:
    path, band, dots = [], [], []
    for piece in series.pieces:
        clean = [p for p in piece if math.isfinite(p[1])]
        mean, lowest, highest = thin(clean)
        path.append(_path([place(p) for p in mean]))  # type: ignore[operator]
        if lowest:
            around = [*highest, *reversed(lowest)]
            band.append(_path([place(p) for p in around]) + "Z")  # type: ignore[operator]
        if series.dots:
            dots += [(x / BOX * 100, y / BOX * 100) for x, y in (place(p) for p in mean)]  # type: ignore[operator]
    inside = [(x, y) for x, y in dots if -0.01 <= y <= 100.01]
    return Line(
        label=series.label,
        colour=series.colour % NUM_COLOURS,
        path=" ".join(p for p in path if p),
        band=" ".join(band),
        dots=inside,
        dashed=series.dashed,
    )


def _path(points: Sequence[Point]) -> str:
    if len(points) == 1:  # a line of no length is still a round dot
        points = [points[0], points[0]]
    return "".join(f"{'L' if i else 'M'}{x:.1f} {_held(y):.1f}" for i, (x, y) in enumerate(points))


def _held(y: float) -> float:
    """Far outside of the box a coordinate only costs bytes."""
    return min(3 * BOX, max(-2 * BOX, y))


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> tuple[list[Point], list[Point], list[Point]]:
    """At most so many points: means, and the lowest and highest of what was averaged (empty when nothing was)."""
    if len(points) <= most:
        return list(points), [], []
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    mean = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    lowest = [(m[0], min(y for _, y in g)) for m, g in zip(mean, groups, strict=True)]
    highest = [(m[0], max(y for _, y in g)) for m, g in zip(mean, groups, strict=True)]
    return mean, lowest, highest


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, the first not above `low`, the last not below `high`."""
    if not high > low:
        low, high = (low - abs(low) * 0.1, low + abs(low) * 0.1) if low else (0.0, 1.0)
    raw = (high - low) / about
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, max(last, first + 1) + 1)]


def tick_digits(ticks: Sequence[float]) -> int | None:
    """Digits after the point that tell ticks apart; None = write them in scientific form."""
    size = max(abs(t) for t in ticks)
    if size >= 100_000 or size < 0.01:
        return None
    step = ticks[1] - ticks[0]
    return next((d for d in range(5) if abs(step - round(step, d)) < 1e-9), 5)


def tick_label(value: float, digits: int | None) -> str:
    """A tick as text."""
    if value == 0:
        return "0"
    if digits is None:
        return show_count(value) if abs(value) >= 1 else f"{value:.1e}"
    return f"{value:,.{digits}f}"
