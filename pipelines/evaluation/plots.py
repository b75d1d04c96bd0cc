"""Draw small plots as SVG from arrays. The CSS of the surrounding page defines the colours, also in dark mode."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MOST_POINTS = 400
"""Maximum number of points that are drawn for one curve."""
WIDTH, HEIGHT = 320, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 24, 36
"""Size of a plot and of its margins, in CSS pixels."""
Limits = tuple[float, float]


def line_plot(
    title: str,
    x_name: str,
    y_name: str,
    points: tuple[NDArray[np.float64], NDArray[np.float64]],
    *,
    mark: int | None = None,
    diagonal: bool = False,
    unit: bool = True,
    dots: bool = False,
    line: bool = True,
) -> str:
    """Return a line plot as SVG.

    Args:
        title: Title of the plot.
        x_name: Name of the x axis.
        y_name: Name of the y axis.
        points: The x and the y values.
        mark: Index of the point that gets a large dot.
        diagonal: Whether to draw the line of equal x and y.
        unit: Whether both axes go from 0 to 1. Otherwise they go from the smallest to the largest value, rounded.
        dots: Whether to draw a dot at every point.
        line: Whether to draw the line.
    """
    x, y = points
    x_ticks, y_ticks = ([0, 0.25, 0.5, 0.75, 1.0],) * 2 if unit else (ticks(x), ticks(y))
    if diagonal and not unit:
        x_ticks = y_ticks = ticks(np.concatenate([x, y]))
    x_limits, y_limits = (x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1])

    def place(x: NDArray[np.float64], y: NDArray[np.float64]) -> list[tuple[float, float]]:
        return [
            (_across(a, x_limits), _down(b, y_limits)) for a, b in zip(x.astype(float), y.astype(float), strict=True)
        ]

    chosen = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).astype(int))
    drawn = place(x[chosen], y[chosen])
    both = np.array([max(x_limits[0], y_limits[0]), min(x_limits[1], y_limits[1])])
    shapes = [_line(place(both, both), "faint")] if diagonal else []
    shapes += [_line(drawn, "line")] if line else []
    shapes += [_dot(point, "point") for point in drawn] if dots else []
    if mark is not None and 0 <= mark < len(x):
        shapes.append(_dot(place(x[mark : mark + 1], y[mark : mark + 1])[0], "mark"))
    return _frame((title, x_name, y_name), x_ticks, y_ticks, shapes)


def histogram_plot(title: str, y_name: str, counts: Sequence[NDArray[np.int64]]) -> str:
    """Return histograms over [0, 1] as SVG, on one scale, with bars side by side in each bin.

    Args:
        title: Title of the plot.
        y_name: Name of the y axis.
        counts: The counts of each histogram, (bins,). All have the same number of bins.
    """
    y_ticks = ticks(np.array([0, max(int(max(count.max() for count in counts)), 1)]))
    limits, bins, shapes = (y_ticks[0], y_ticks[-1]), len(counts[0]), []
    for number, count in enumerate(counts):
        for place, value in enumerate(count.tolist()):
            x = _across((place + number / len(counts)) / bins, (0, 1))
            y = _down(value, limits)
            size = f'width="{(WIDTH - LEFT - RIGHT) / bins / len(counts):.1f}" height="{HEIGHT - BOTTOM - y:.1f}"'
            shapes.append(f'<rect class="bar{number}" x="{x:.1f}" y="{y:.1f}" {size}/>')
    return _frame((title, "score", y_name), [0, 0.25, 0.5, 0.75, 1.0], y_ticks, shapes)


def ticks(values: NDArray[np.number]) -> list[float]:
    """Return three to seven round numbers at equal distances that enclose the values."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = power * next(size for size in (1, 2, 2.5, 5, 10) if (high - low) / (size * power) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _across(x: float, limits: Limits) -> float:
    return LEFT + (x - limits[0]) / (limits[1] - limits[0]) * (WIDTH - LEFT - RIGHT)


def _down(y: float, limits: Limits) -> float:
    return HEIGHT - BOTTOM - (y - limits[0]) / (limits[1] - limits[0]) * (HEIGHT - TOP - BOTTOM)


def _frame(names: tuple[str, str, str], x_ticks: list[float], y_ticks: list[float], shapes: Sequence[str]) -> str:
    """Draw axes with ticks and a grid around the shapes. The names are those of the plot, the x and the y axis."""
    title, x_name, y_name = names
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    grid, words = "", _words(LEFT, 14, "start", title, "title")
    for tick in x_ticks:
        x = _across(tick, (x_ticks[0], x_ticks[-1]))
        grid += f"M{x:.1f} {TOP}V{bottom}"
        words += _words(x, bottom + 13, "end" if tick == x_ticks[-1] else "middle", _short(tick), "tick")
    for tick in y_ticks:
        y = _down(tick, (y_ticks[0], y_ticks[-1]))
        grid += f"M{LEFT} {y:.1f}H{right}"
        words += _words(LEFT - 5, y + 3, "end", _short(tick), "tick")
    words += _words((LEFT + right) / 2, HEIGHT - 6, "middle", x_name)
    middle = (TOP + bottom) / 2
    turned = f'transform="rotate(-90 10 {middle:.0f})"'
    words += f'<text x="10" y="{middle:.0f}" text-anchor="middle" {turned}>{html.escape(y_name)}</text>'
    axes = f'<path class="grid" d="{grid}"/><path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>'
    label = html.escape(f"{title}: {y_name} over {x_name}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{axes}{"".join(shapes)}{words}</svg>'


def _words(x: float, y: float, where: str, words: str, kind: str = "name") -> str:
    return f'<text class="{kind}" x="{x:.0f}" y="{y:.0f}" text-anchor="{where}">{html.escape(words)}</text>'


def _short(number: float) -> str:
    if number and abs(number) >= 10_000:
        return f"{number / 1e6:.4g}M" if abs(number) >= 1e6 else f"{number / 1e3:.4g}k"
    return f"{number:.4g}"


def _line(points: Sequence[tuple[float, float]], kind: str) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _dot(point: tuple[float, float], kind: str) -> str:
    return f'<circle class="{kind}" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="{4 if kind == "mark" else 2}"/>'
