"""Line plots: labels at the ends of the lines, small multiples for many lines, log axes with enough tick labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from megapromoe.plot_styles import Style

MAX_LINES = 12  # in one panel; more lines are drawn as small multiples
COLUMNS = 4  # of small multiples
PANEL_HEIGHT = 1.55  # of a small multiple, inches
LABEL_SIZE = 8  # points
MARKS = 6  # markers on a curve of many points
GREY = "0.82"


@dataclass(frozen=True)
class Curve:
    """A line: its points, its label as matplotlib text, its style."""

    x: Sequence[float]
    y: Sequence[float]
    name: str
    style: Style


def height_of(curves: int, one_panel: float = 4.2) -> float:
    """Height in inches that `draw_curves` needs for this number of curves."""
    return one_panel if curves <= MAX_LINES else 0.9 + PANEL_HEIGHT * math.ceil(curves / COLUMNS)


def draw_curves(
    place: Axes | Figure | SubFigure, curves: Sequence[Curve], title: str, finish: Callable[[Axes], object]
) -> list[Axes]:
    """Draws curves into one panel, or as small multiples if there are more than `MAX_LINES` and `place` is a figure.

    Each small multiple shows one curve in its colour, the baseline in black, and all other curves in grey.

    Args:
        place: a panel, or a figure in which panels are created.
        finish: sets labels, scales and limits of a panel after its curves are drawn.

    Returns:
        The panels. For a single panel, `name_ends` adds the labels of the curves when the figure is complete.
    """
    if isinstance(place, Axes) or len(curves) <= MAX_LINES:
        ax = place if isinstance(place, Axes) else place.subplots()
        for curve in curves:
            _draw(ax, curve)
        ax.set_title(title, fontsize=10)
        finish(ax)
        return [ax]
    rows = math.ceil(len(curves) / COLUMNS)
    grid = list(place.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flatten())
    panels = grid[: len(curves)]
    for ax in grid[len(curves) :]:
        ax.set_axis_off()
    for number, (shown, ax) in enumerate(zip(curves, panels, strict=True)):
        for curve in curves:
            if not curve.style.is_baseline:
                ax.plot(curve.x, curve.y, color=GREY, linewidth=0.6)
        for curve in curves:
            if curve.style.is_baseline or curve is shown:
                _draw(ax, curve)
        finish(ax)
        labels = ax.get_xlabel(), ax.get_ylabel()
        ax.set(xlabel="", ylabel="")
        ax.set_title(shown.name, fontsize=LABEL_SIZE)
        ax.tick_params(labelsize=7, labelbottom=number + COLUMNS >= len(curves))
    place.suptitle(title, fontsize=10)
    place.supxlabel(labels[0], fontsize=8)
    place.supylabel(labels[1], fontsize=8)
    return panels


def name_ends(panels: Sequence[Axes]) -> None:
    """Writes the labels of the curves right of a single panel, without overlap, with lines to the last points.

    Does nothing for several panels, which have titles. Call it when the figure is complete, because positions depend on
    the size of the panel.
    """
    if len(panels) != 1:
        return
    (ax,) = panels
    named = [(line, np.asarray(line.get_xydata())) for line in ax.lines if not str(line.get_label()).startswith("_")]
    lines = [(line, points[-1]) for line, points in named if len(points)]
    if not lines:
        return
    ax.figure.figure.draw_without_rendering()  # computes the layout
    box = ax.get_window_extent()
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = [to_axes.transform(end) for _, end in lines]
    inches = box.height / ax.figure.figure.dpi
    places = spread([float(y) for _, y in ends], 1.25 * LABEL_SIZE / 72 / inches)
    unit = 1 / (box.width / ax.figure.figure.dpi)  # an inch, as a share of the panel's width
    for (line, _), (x, y), place in zip(lines, ends, places, strict=True):
        colour, start = line.get_color(), 1 + 0.15 * unit
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2, "relpos": (0, 0.5)}
        sample = Line2D([start, start + 0.17 * unit, start + 0.34 * unit], [place] * 3, transform=ax.transAxes)
        sample.update_from(line)
        sample.set(transform=ax.transAxes, clip_on=False, markevery=[1], label="_")
        ax.figure.add_artist(sample)
        fractions: dict[str, Any] = {
            "xycoords": "axes fraction",
            "textcoords": "axes fraction",
            "annotation_clip": False,
        }
        ax.annotate("", (x, y), (start, place), arrowprops=leader, **fractions)
        ax.annotate(
            str(line.get_label()),
            (x, y),
            (start + 0.4 * unit, place),
            color=colour,
            size=LABEL_SIZE,
            va="center",
            **fractions,
        )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions in [0, 1] that are at least `gap` apart, in the order of `wanted` and as near to it as possible.

    If there is no room for all, they exceed 1.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Minus the gaps, the positions must be non-decreasing. The least-squares solution is isotonic regression (pool
    # adjacent violators): each pool of neighbours that would decrease gets its mean.
    pools: list[tuple[float, int]] = []
    for nth, i in enumerate(order):
        mean, count = wanted[i] - nth * gap, 1
        while pools and pools[-1][0] > mean:
            before, size = pools.pop()
            mean, count = (mean * count + before * size) / (count + size), count + size
        pools.append((mean, count))
    highest = max(0.0, 1 - gap * (len(wanted) - 1))
    levels = [min(max(mean, 0.0), highest) for mean, count in pools for _ in range(count)]
    positions = {i: level + nth * gap for nth, (i, level) in enumerate(zip(order, levels, strict=True))}
    return [positions[i] for i in range(len(wanted))]


def label_log_axis(ax: Axes, which: Literal["x", "y"]) -> None:
    """Makes an axis logarithmic with at least three labelled ticks, even if it spans less than a decade.

    Call it after drawing: the ticks are chosen for the current limits.
    """
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    axis = ax.xaxis if which == "x" else ax.yaxis
    low, high = sorted(axis.get_view_interval())
    ticks = log_ticks(low, high)
    digits = next(d for d in (3, 4, 5, 6, 17) if len({number(tick, d) for tick in ticks}) == len(ticks))
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value, digits)))


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive limits: the coarsest of several sets that has at least four in the range."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for parts in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 4, 5, 6, 8),
        (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9),
    ):
        ticks = [part * 10.0**exponent for exponent in exponents for part in parts]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 4:
            return inside[:: math.ceil(len(inside) / 8)]
    return [float(tick) for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]


def number(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits, as text for matplotlib; outside [1e-3, 1e5) with a power of ten."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    factor = f"{value / 10**exponent:.{digits}g}"
    return rf"$10^{{{exponent}}}$" if factor == "1" else rf"${factor}\times10^{{{exponent}}}$"


def _draw(ax: Axes, curve: Curve) -> None:
    every = max(1, math.ceil(len(curve.x) / MARKS))
    ax.plot(curve.x, curve.y, label=curve.name, markevery=every, **curve.style.of_line)
