"""Line and interval charts as SVG text: small, coloured by the page's style sheet (so that they follow dark mode), toggled by its legend.

A line of a series `k` has the class `s<k>`; what the class looks like, the page says. Coordinates are whole tenths of a unit, relative to the point
before, so that fifty runs fit into a page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Place = Callable[[Array, Array], Array]  # x, y [n] to points of the drawing [n, 2]
WIDTH, HEIGHT = 380, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 8, 34  # margins
ROW = 22  # height of a row of an interval chart


@dataclass(frozen=True)
class Line:
    """One line: `x`, `y` `[n]`, and the ends of its band, NaN where there is none. `series`: which class; `label`: its name."""

    series: int
    label: str
    x: Array
    y: Array
    low: Array | None = None
    high: Array | None = None


@dataclass(frozen=True)
class Span:
    """A point with its interval, in a row of its own."""

    series: int
    label: str
    value: float
    low: float
    high: float


def line_chart(
    name: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    alt: str,
    view: tuple[float, float] | None = None,
    points: int = 200,
) -> str:
    """Lines with bands. `name` keeps ids apart; `view`: the y axis (default: what the lines, not their bands, take); `points`: most per line."""
    lines = [_thinned(line, points) for line in lines]
    x_low, x_high = _range([line.x for line in lines])
    low, high = view if view is not None else _range([line.y for line in lines], room=0.08)
    scale_x = (WIDTH - LEFT - RIGHT) / (x_high - x_low)
    scale_y = (HEIGHT - TOP - BOTTOM) / (high - low)

    def place(x: Array, y: Array) -> Array:
        within = np.clip(y, low - (high - low), high + (high - low))
        return np.stack([LEFT + (x - x_low) * scale_x, TOP + (high - within) * scale_y], -1)

    body = [_axes(_ticks(x_low, x_high), _ticks(low, high), place)]
    body += [
        f"<text x='{(WIDTH + LEFT - RIGHT) / 2:g}' y='{HEIGHT - 3}' text-anchor='middle'>{escape(x_label)}</text>",
        f"<text transform='translate(10 {(HEIGHT - BOTTOM + TOP) / 2:g}) rotate(-90)' text-anchor='middle'>{escape(y_label)}</text>",
        f"<clipPath id='{name}'><rect x='{LEFT}' y='{TOP}' width='{WIDTH - LEFT - RIGHT}' height='{HEIGHT - TOP - BOTTOM}'/></clipPath>"
        f"<g clip-path='url(#{name})'>",
    ]
    for line in lines:
        band = "" if line.low is None or line.high is None else _band(line.x, line.low, line.high, place)
        curve = f"<path class='line' d='{_path(place(line.x, line.y))}'/>"
        body.append(f"<g class='s{line.series}'><title>{escape(line.label)}</title>{band}{curve}</g>")
    return _svg(WIDTH, HEIGHT, alt, [*body, "</g>"])


def interval_chart(spans: Sequence[Span], *, x_label: str, alt: str) -> str:
    """Points with intervals below each other."""
    ends = [np.array([span.value, span.low, span.high]) for span in spans]
    low, high = _range(ends, room=0.05)
    left = 10 + 6.2 * min(26, max(len(span.label) for span in spans))
    scale = (WIDTH - left - RIGHT) / (high - low)
    bottom = TOP + ROW * len(spans)

    def at(value: float) -> float:
        return round(left + (value - low) * scale, 1)

    body = [
        f"<path class='grid' d='M{at(tick)} {TOP}V{bottom}'/><text x='{at(tick)}' y='{bottom + 14}' text-anchor='middle'>{tick:g}</text>"
        for tick in _ticks(low, high)
    ]
    for index, span in enumerate(spans):
        y = TOP + ROW * (index + 0.5)
        bar = "" if math.isnan(span.low) else f"<path class='line' d='M{at(span.low)} {y}H{at(span.high)}'/>"
        dot = "" if math.isnan(span.value) else f"<circle cx='{at(span.value)}' cy='{y}' r='4'/>"
        said = "" if bar or dot else f"<text x='{left + 4:g}' y='{y + 4}'>no scores</text>"
        label = span.label if len(span.label) <= 26 else span.label[:25] + "…"
        text = f"<text x='{left - 8:g}' y='{y + 4}' text-anchor='end'>{escape(label)}</text>"
        body.append(f"<g class='s{span.series}'><title>{escape(span.label)}</title>{bar}{dot}{text}{said}</g>")
    body.append(f"<text x='{(WIDTH + left) / 2:g}' y='{bottom + 29}' text-anchor='middle'>{escape(x_label)}</text>")
    return _svg(WIDTH, bottom + 34, alt, body)


def _svg(width: float, height: float, alt: str, body: Iterable[str]) -> str:
    label = escape(alt, quote=True).replace("'", "&#39;")
    return f"<svg viewBox='0 0 {width:g} {height:g}' role='img' aria-label='{label}'>{''.join(body)}</svg>"


def _axes(x_ticks: Sequence[float], y_ticks: Sequence[float], place: Place) -> str:
    parts = []
    for tick in x_ticks:
        x = round(float(place(np.array([tick]), np.array([0.0]))[0, 0]), 1)
        text = f"<text x='{x}' y='{HEIGHT - BOTTOM + 13}' text-anchor='middle'>{_short(tick)}</text>"
        parts.append(f"<path class='grid' d='M{x} {TOP}V{HEIGHT - BOTTOM}'/>{text}")
    for tick in y_ticks:
        y = round(float(place(np.array([0.0]), np.array([tick]))[0, 1]), 1)
        parts.append(
            f"<path class='grid' d='M{LEFT} {y}H{WIDTH - RIGHT}'/><text x='{LEFT - 4}' y='{y + 3.5:g}' text-anchor='end'>{_short(tick)}</text>"
        )
    return "".join(parts)


def _band(x: Array, low: Array, high: Array, place: Place) -> str:
    known = np.isfinite(low) & np.isfinite(high)
    parts = []
    for start, stop in _pieces(known):
        upper, lower = (place(x[start:stop], end[start:stop]) for end in (high, low))
        edge = np.concatenate([upper, lower[::-1]])
        parts.append(_path(edge) + "z")
    return f"<path class='band' d='{''.join(parts)}'/>" if parts else ""


def _path(points: Array) -> str:
    """The path through points `[n, 2]`, broken where one is not finite."""
    pieces = []
    for start, stop in _pieces(np.isfinite(points.sum(axis=1))):
        tenths = np.round(points[start:stop] * 10).astype(np.int64)
        moves = np.diff(tenths, axis=0)
        first = f"M{tenths[0, 0]} {tenths[0, 1]}"
        pieces.append(first + ("l" + " ".join(f"{x} {y}" for x, y in moves.tolist()) if len(moves) else "h1"))
    return "".join(pieces)


def _pieces(known: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Where runs of True begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _thinned(line: Line, points: int) -> Line:
    """Every n-th point and the last one."""
    step = -(-len(line.x) // max(points, 2))
    if step <= 1:
        return line
    kept = np.unique(np.append(np.arange(0, len(line.x), step), len(line.x) - 1))
    ends = [None if values is None else values[kept] for values in (line.low, line.high)]
    return Line(line.series, line.label, line.x[kept], line.y[kept], *ends)


def _range(arrays: Sequence[Array], room: float = 0.0) -> tuple[float, float]:
    """Smallest and largest finite number, with room on both sides; never of width zero."""
    values = np.concatenate([np.ravel(array) for array in arrays]) if arrays else np.zeros(0)
    values = values[np.isfinite(values) & (np.abs(values) < 1e300)]
    if not values.size:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        wide = abs(high) * 0.1 or 1.0
        return low - wide, high + wide
    return low - room * (high - low), high + room * (high - low)


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between low and high."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * size for size in (1, 2, 5, 10) if power * size >= raw)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{(first + index) * step:.12g}") for index in range(math.floor(high / step + 1e-9) - first + 1)]


def _short(value: float) -> str:
    """A number of an axis in few characters."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e3 * size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
