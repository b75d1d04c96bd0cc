"""Draw small plots as SVG from arrays. The CSS classes of the surrounding page define the colours."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MOST_POINTS = 400
"""Maximum number of points that are drawn for one curve."""
WIDTH, HEIGHT, EDGE = 300, 200, 34
"""Size of a plot, and of the margin for axis names, in CSS pixels."""


def line_plot(
    title: str,
    x_name: str,
    lines: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
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
        lines: The (x, y) arrays of each line.
        mark: Index of the point of each line that gets a large dot.
        diagonal: Whether to draw the diagonal from (0, 0) to (1, 1), and a dot at every point.
        unit: Whether both axes go from 0 to 1. Otherwise they go from the smallest to the largest value.
        dots: Whether to draw a dot at every point.
        line: Whether to draw the lines.
    """
    every_x, every_y = (np.concatenate([xy[axis] for xy in lines]) for axis in (0, 1))
    low_x, high_x = (0.0, 1.0) if unit else _limits(every_x)
    low_y, high_y = (0.0, 1.0) if unit else _limits(every_y)

    def place(x: NDArray[np.float64], y: NDArray[np.float64]) -> list[tuple[float, float]]:
        across = EDGE + (x - low_x) / (high_x - low_x) * (WIDTH - EDGE - 8)
        down = HEIGHT - EDGE - (y - low_y) / (high_y - low_y) * (HEIGHT - EDGE - 24)
        return list(zip(across.tolist(), down.tolist(), strict=True))

    shapes = [_line(place(np.array([0.0, 1.0]), np.array([0.0, 1.0])), "faint")] if diagonal else []
    for x, y in lines:
        chosen = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).astype(int))
        points = place(x[chosen], y[chosen])
        shapes += [_line(points, "line")] if line else []
        shapes += [_dot(point, "point") for point in points] if dots or diagonal else []
        if mark is not None and 0 <= mark < len(x):
            shapes.append(_dot(place(x[mark : mark + 1], y[mark : mark + 1])[0], "mark"))
    return _frame(title, x_name, (low_x, high_x), (low_y, high_y), shapes)


def histogram_plot(title: str, counts: Sequence[NDArray[np.int64]]) -> str:
    """Return histograms over [0, 1] as SVG, on one scale, with bars side by side in each bin.

    Args:
        title: Title of the plot.
        counts: The counts of each histogram, (bins,). All have the same number of bins.
    """
    most = max(int(max(count.max() for count in counts)), 1)
    bins, across, shapes = len(counts[0]), WIDTH - EDGE - 8, []
    for number, count in enumerate(counts):
        for place, value in enumerate(count.tolist()):
            height = value / most * (HEIGHT - EDGE - 24)
            x = EDGE + (place + number / len(counts)) / bins * across
            size = f'width="{across / bins / len(counts):.1f}" height="{height:.1f}"'
            shapes.append(f'<rect class="bar{number}" x="{x:.1f}" y="{HEIGHT - EDGE - height:.1f}" {size}/>')
    return _frame(title, "score", (0, 1), (0, most), shapes)


def _frame(title: str, x_name: str, x: tuple[float, float], y: tuple[float, float], shapes: Sequence[str]) -> str:
    bottom, right = HEIGHT - EDGE, WIDTH - 8
    texts = [
        (EDGE, 14, "start", title),
        ((EDGE + right) / 2, HEIGHT - 6, "middle", x_name),
        (EDGE, bottom + 14, "start", f"{x[0]:.3g}"),
        (right, bottom + 14, "end", f"{x[1]:.4g}"),
        (EDGE - 4, bottom, "end", f"{y[0]:.3g}"),
        (EDGE - 4, 30, "end", f"{y[1]:.3g}"),
    ]
    words = "".join(f'<text x="{a:.0f}" y="{b:.0f}" text-anchor="{c}">{html.escape(d)}</text>' for a, b, c, d in texts)
    axes = f'<path class="axis" d="M{EDGE} 24V{bottom}H{right}"/>'
    drawn = f"{axes}{''.join(shapes)}{words}"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{drawn}</svg>'


def _line(points: Sequence[tuple[float, float]], kind: str) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _dot(point: tuple[float, float], kind: str) -> str:
    return f'<circle class="{kind}" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="{4 if kind == "mark" else 2}"/>'


def _limits(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)
