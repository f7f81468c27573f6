"""Plots the quality of sampled images over training: FID, or a classifier's Fréchet distance, against steps."""

from __future__ import annotations

import textwrap
from itertools import chain
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megapromoe.evaluation.names import higher_is_better
from megapromoe.plot_lines import label_log_axis
from megapromoe.plot_styles import Style
from megapromoe.plot_text import literal
from megapromoe.studies.curves import figures, titled
from megapromoe.studies.figure_tables import mean_figures
from megapromoe.studies.image_plots import of_shared_seeds, plot_label, styles_of
from megapromoe.studies.study import Study
from megapromoe.studies.tables import Rows, first_figure, groups

BANDS = 6  # maximum number of curves in a panel with intervals; more would be indistinguishable
PANELS = 3  # maximum number of guidance scales; of more, the first, the middle and the last are plotted
TITLE_LETTERS = 12.5  # of the size of the title, in an inch


def draw_evaluations(study: Study, rows: Rows) -> Figure | None:
    """The first figure against steps, a panel for each guidance scale: mean over the seeds that all models have, of a
    few models with its 95 % interval.

    None where no model was evaluated at two steps. The baseline is black.
    """
    first, done = first_figure(rows), {row["task"] for row in rows}
    all_figures = [figure for task in study.tasks if task.name in done for figure in figures(study, task)]
    shared, seeds = of_shared_seeds(groups([row for row in all_figures if titled(row) == first], study.recipe))
    figure_rows = list(chain.from_iterable(shared.values()))
    means = mean_figures(figure_rows, study.recipe)
    curves: dict[float, dict[tuple[str, tuple], list[dict[str, Any]]]] = {}
    for key in groups(figure_rows, study.recipe):
        for row in means:
            if row["variant"] == key[0] and all(row.get(axis) == value for axis, value in key[1]):
                curves.setdefault(row["guidance"], {}).setdefault(key, []).append(row)
    scales = [scale for scale, lines in sorted(curves.items()) if any(len(points) > 1 for points in lines.values())]
    if not scales or first is None:
        return None
    if len(scales) > PANELS:
        scales = [scales[0], scales[len(scales) // 2], scales[-1]]
    figure = Figure(figsize=(1.2 + 4.8 * len(scales), 4.8), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, which would keep all figures in memory
    panels = figure.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    styles = styles_of(study, groups(figure_rows, study.recipe))
    for ax, scale in zip(panels, scales, strict=True):
        for key, points in curves[scale].items():
            _draw_curve(ax, points, plot_label(*key), styles[key], len(curves[scale]) <= BANDS)
        ax.set_xlabel("training step")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(f"guidance {scale:g}", fontsize=10)
        ax.grid(alpha=0.3)
    # Intervals of two seeds are wide, so only the means set the limits of the axis.
    shown = [row["mean"] for scale in scales for points in curves[scale].values() for row in points]
    is_score = higher_is_better(first)
    if min(shown) > 0 and not is_score:
        margin = max(1.05, (max(shown) / min(shown)) ** 0.1)
        panels[0].set_ylim(min(shown) / margin, max(shown) * margin)
    for ax in panels if not is_score else ():
        label_log_axis(ax, "y")
    panels[0].set_ylabel(literal(first), fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(4, len(labels)),
        fontsize=8,
        frameon=False,
        handlelength=3.2,
    )
    bands = any(ax.collections for ax in panels)
    better = "higher" if is_score else "lower"
    title = f"Sampled images over training, {study.recipe.weights} weights, {better} is better; {seeds}"
    title += "; bands: 95 % intervals over seeds" if bands else ""
    figure.suptitle(textwrap.fill(title, int(TITLE_LETTERS * figure.get_figwidth())), fontsize=10)
    return figure


def _draw_curve(ax, points: list[dict[str, Any]], label: str, style: Style, has_band: bool) -> None:
    steps, means = [row["step"] for row in points], [row["mean"] for row in points]
    ax.plot(steps, means, label=label, **style.of_line)
    halves = [row["half_interval"] or 0.0 for row in points]
    if has_band and any(halves):
        # A logarithmic axis shows only the positive part of an interval.
        low = [max(mean - half, 1e-3 * mean) for mean, half in zip(means, halves, strict=True)]
        high = [mean + half for mean, half in zip(means, halves, strict=True)]
        ax.fill_between(steps, low, high, color=style.colour, alpha=0.12, linewidth=0)
