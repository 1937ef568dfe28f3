"""Line charts as SVG text, for pages that must need nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 470, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 42
INK, GRID, ACCENT, LIMIT = "#1d2433", "#e3e6eb", "#2b5c9e", "#b3372f"
MAX_POINTS = 1500

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    points: Points
    colour: str = ACCENT
    is_step: bool = False


@dataclass(frozen=True, slots=True)
class Marks:
    name: str
    points: Points
    colour: str = ACCENT


@dataclass(frozen=True, slots=True)
class Band:
    """A range of x."""

    low: float
    high: float


@dataclass
class Chart:
    title: str
    x_label: str
    y_label: str
    y_max: float | None = None
    is_log: bool = False  # x
    lines: list[Line] = field(default_factory=list)
    marks: list[Marks] = field(default_factory=list)
    bands: list[Band] = field(default_factory=list)
    verticals: list[tuple[float, str]] = field(default_factory=list)
    horizontals: list[tuple[float, str]] = field(default_factory=list)

    def svg(self) -> str:
        drawn: list[Line | Marks] = [*self.lines, *self.marks]
        points = [point for series in drawn for point in series.points]
        xs = [x for x, _ in points] + [x for x, _ in self.verticals]
        xs = [x for x in xs if not self.is_log or x > 0] or [1.0]
        low, high = min(xs), max(xs)
        if low == high:
            low, high = low * 0.9, high * 1.1 + 1e-9
        top = self.y_max or max((y for _, y in points), default=1.0) * 1.05 or 1.0
        frame = _Frame(low, high, top, self.is_log)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
            f'font-family="system-ui,sans-serif" font-size="11" fill="{INK}">',
            f'<text x="{LEFT}" y="16" font-size="13" font-weight="600">{escape(self.title)}</text>',
            *self._axes(frame),
            *self._content(frame),
            "</svg>",
        ]
        return "".join(parts)

    def _axes(self, frame: _Frame) -> list[str]:
        parts = []
        for value in ticks(0.0, frame.top):
            y = frame.y(value)
            parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        for value in decades(frame.low, frame.high) if self.is_log else ticks(frame.low, frame.high):
            x, y = frame.x(value), HEIGHT - BOTTOM
            parts.append(f'<path d="M{x:.1f} {TOP}V{y}" stroke="{GRID}"/>')
            parts.append(f'<text x="{x:.1f}" y="{y + 15}" text-anchor="middle">{value:g}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(
            f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(self.x_label)}</text>'
            f'<text transform="translate(12 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y_label)}</text>"
        )
        return parts

    def _content(self, frame: _Frame) -> list[str]:
        parts = []
        for band in self.bands:
            x, end = frame.x(band.low), frame.x(band.high)
            parts.append(
                f'<rect x="{x:.1f}" y="{TOP}" width="{max(end - x, 1):.1f}" height="{HEIGHT - TOP - BOTTOM}" '
                f'fill="{ACCENT}" opacity=".12"/>'
            )
        for place, (value, name) in enumerate(self.verticals):
            x = frame.x(value)
            parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{LIMIT}" stroke-dasharray="4 3"/>')
            place_of = f'x="{x - 4:.1f}" y="{TOP + 12 + 13 * place}" text-anchor="end"'
            parts.append(f'<text {place_of} fill="{LIMIT}">{escape(name)}</text>')
        for value, _ in self.horizontals:
            y = frame.y(value)
            parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{LIMIT}" stroke-dasharray="2 3"/>')
        for marks in self.marks:
            dots = "".join(
                f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.4"/>' for x, y in thinned(marks.points)
            )
            parts.append(f'<g fill="{marks.colour}" fill-opacity=".75">{dots}</g>')
        for line in self.lines:
            parts.append(f'<path d="{frame.path(line)}" fill="none" stroke="{line.colour}" stroke-width="1.7"/>')
        drawn: list[Line | Marks] = [*self.lines, *self.marks]
        named = [series for series in drawn if series.name]
        for place, series in enumerate(named):
            x = WIDTH - RIGHT - 90 * (len(named) - place)
            parts.append(f'<circle cx="{x}" cy="12" r="4" fill="{series.colour}"/>')
            parts.append(f'<text x="{x + 8}" y="16">{escape(series.name)}</text>')
        return parts


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where values are in the picture."""

    low: float
    high: float
    top: float
    is_log: bool

    def x(self, value: float) -> float:
        if self.is_log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return LEFT + min(max(share, 0.0), 1.0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - min(max(value / self.top, 0.0), 1.0) * (HEIGHT - TOP - BOTTOM)

    def path(self, line: Line) -> str:
        steps: list[str] = []
        for x, y in thinned(line.points):
            at = f"{self.x(x):.1f} {self.y(y):.1f}"
            steps.append(
                f"H{self.x(x):.1f}V{self.y(y):.1f}" if line.is_step and steps else f"{'L' if steps else 'M'}{at}"
            )
        return "".join(steps)


def thinned(points: Points) -> Points:
    """At most MAX_POINTS of them, evenly; the last one stays."""
    if len(points) <= MAX_POINTS:
        return points
    step = len(points) / MAX_POINTS
    return [*(points[int(i * step)] for i in range(MAX_POINTS)), points[-1]]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, about five."""
    raw = (high - low) / 5
    if not raw > 0:
        return [low]
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """1 2 5 10 ..., as far as they are inside; a range without any has its ends."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    return [value for value in found if low <= value <= high] or [low, high]
