"""The picture of a routing trace: the load of each expert over time, and how uneven it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megapromoe.plot_styles import assign
from megapromoe.routing_analysis.figures import colour_bar, new_figure, panel_axes, stacked
from megapromoe.routing_analysis.trace import LoadSeries, relative_load

COLUMNS = 300  # of a heat map: neighbouring records are added up if there are more
DOUBLINGS = 2  # the colours end at 2^-2 and 2^2 times the mean
EVERY_EXPERT = 16  # up to this number, each expert has a tick
TICKS = 5  # of the axis of steps


def trace_figure(series: LoadSeries, drift: Sequence[Mapping[str, Any]] = ()) -> Figure:
    """Curves of the fullest expert and rank over the mean, of the drift if there are routes, and a heat map a layer."""
    M, E = series.rows_NME.shape[1:]
    wide = min(M, 4)
    curves_height, maps_height = 2.6, math.ceil(M / wide) * (1.2 + 0.09 * min(E, 24))
    figure = new_figure(max(3.0 * wide + 1.4, 8.0), curves_height + maps_height + 0.4)
    curves, maps = stacked(figure, [curves_height, maps_height])
    panels = list(curves.subplots(1, 2 if drift else 1, squeeze=False)[0])
    _draw_series(panels[0], series)
    if drift:
        _draw_drift(panels[1], drift)
        panels[1].set_xlim(panels[0].get_xlim())
    _draw_maps(maps, series)
    return figure


def _draw_series(ax: Axes, series: LoadSeries) -> None:
    some = ~np.isnan(series.expert_NM).all(1)
    lines = {
        "fullest expert, worst block": np.nanmax(series.expert_NM[some], 1),
        "fullest expert, median block": np.nanmedian(series.expert_NM[some], 1),
        "fullest rank, all blocks": series.step_N[some],
    }
    styles = assign([*lines])
    for name, values in lines.items():
        ax.plot(series.steps_N[some], values, label=name, linewidth=1.2, color=styles[name].colour)
    ax.axhline(1, color="black", linewidth=0.8, linestyle="--", label="even")
    ax.set_ylim(bottom=0.9)
    ax.set_xlabel("step", fontsize=8)
    ax.set_ylabel("rows over the mean", fontsize=8)
    ax.set_title("Fullest over mean in each recorded step", fontsize=10)
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=7, frameon=False)


def _draw_drift(ax: Axes, drift: Sequence[Mapping[str, Any]]) -> None:
    steps, lows, means, highs = [], [], [], []
    for pair in drift:
        changed_L = np.asarray(pair["changed"])
        steps.append(pair["to"])
        lows.append(100 * changed_L.min())
        means.append(100 * changed_L.mean())
        highs.append(100 * changed_L.max())
    style = assign(["mean of the blocks"])["mean of the blocks"]
    ax.fill_between(steps, lows, highs, color=style.colour, alpha=0.2, linewidth=0, label="least to most of a block")
    ax.plot(steps, means, marker="o", markersize=3, color=style.colour, linewidth=1.2, label="mean of the blocks")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("step", fontsize=8)
    ax.set_ylabel("% since the recording before", fontsize=8)
    ax.set_title("Tokens that changed their expert", fontsize=10)
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=7, frameon=False)


def _draw_maps(figure: Any, series: LoadSeries) -> None:
    N, M, E = series.rows_NME.shape
    starts = np.unique(np.linspace(0, N, min(N, COLUMNS) + 1).astype(int))[:-1]
    rows_CME = np.add.reduceat(series.rows_NME, starts, axis=0)
    first_C = series.steps_N[starts]
    with np.errstate(divide="ignore"):
        log_CME = np.log2(relative_load(rows_CME))  # -inf: an expert without rows
    colours = colormaps["RdBu_r"].with_extremes(bad="0.6")
    ticks_C = np.unique(np.linspace(0, len(starts) - 1, TICKS).round().astype(int))
    figure.suptitle("Rows of each expert over the mean of its block, from step to step", fontsize=10)
    for layer, ax in enumerate(panel_axes(figure, M)):
        values = np.ma.masked_invalid(np.maximum(log_CME[:, layer].T, -DOUBLINGS - 1))
        shown = ax.imshow(values, vmin=-DOUBLINGS, vmax=DOUBLINGS, aspect="auto", cmap=colours, interpolation="nearest")
        ax.set_title(f"block {series.blocks[layer]}", fontsize=9)
        ax.set_xticks(ticks_C, [f"{step:,}" for step in first_C[ticks_C]])
        ax.set_yticks(range(0, E, 1 if E <= EVERY_EXPERT else math.ceil(E / 8)))
        ax.tick_params(labelsize=7)
        ax.set_xlabel("step", fontsize=8)
        if layer % 4 == 0:
            ax.set_ylabel("expert", fontsize=8)
    bar = colour_bar(figure, shown, figure.axes, "rows over the mean")
    doublings = range(-DOUBLINGS, DOUBLINGS + 1)
    names = [f"{2.0**power:g}" for power in doublings]
    names[0], names[-1] = f"≤ {names[0]}", f"≥ {names[-1]}"
    bar.set_ticks([*doublings], labels=names)
