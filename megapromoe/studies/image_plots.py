"""The picture of what a study's models draw: training loss, figures of drawn images at the end and over training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib import color_sequences
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megapromoe.plot_text import literal
from megapromoe.run_lines import DENOISING_LOSS
from megapromoe.studies.collect import EVALUATED
from megapromoe.studies.curves import Curves, curves_of, figures
from megapromoe.studies.json_files import metrics
from megapromoe.studies.study import Study
from megapromoe.studies.tables import Rows, evaluated, first_figure, groups, model_name

COLOURS = [to_rgb(colour) for colour in color_sequences["tab10"]]
SHAPES = (("o", "circles"), ("s", "squares"), ("^", "triangles"), ("D", "diamonds"))
PLAIN = FuncFormatter(lambda value, _: f"{value:.3g}")
SMOOTH = 3  # logged values that a curve of the loss averages

Groups = dict[tuple[str, tuple], list[dict]]
Styles = dict[tuple[str, tuple], dict[str, Any]]


def draw_images(study: Study, rows: Rows) -> Figure | None:
    """Training loss over steps, and the first evaluated figure at each guidance scale; None without any figure.

    A third panel shows the figure over training, if all seeds of some model were evaluated at two steps or more. Where
    the recipe names a baseline, what is drawn over steps is shown as a multiple of the baseline's at the same step.
    """
    first = first_figure(rows)
    if first is None:
        return None
    everything = groups(rows, study.recipe)
    styles = {key: {"color": COLOURS[i % 10], "linestyle": "-" if i < 10 else "--"} for i, key in enumerate(everything)}
    done = {row["task"] for row in rows}
    curves = curves_of((found for task in study.tasks if task.name in done for found in figures(study, task)), first)
    means = {key: curves.mean([row["task"] for row in group]) for key, group in everything.items()} if curves else {}
    third = any(len(mean) > 1 for mean in means.values())

    figure = Figure(figsize=(11.5, 9.2 if third else 5.2), layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own: pyplot would keep a list of all figures
    # What is drawn over steps stands side by side.
    panels = figure.subplot_mosaic([["losses", "course"], ["ends", "ends"]] if third else [["losses", "ends"]])
    _draw_losses(panels["losses"], study, everything, styles)
    _draw_ends(panels["ends"], rows, first, everything, styles)
    if third and curves is not None:
        _draw_course(panels["course"], curves, means, styles, study.recipe.baseline)
        lines = panels["losses"].get_legend_handles_labels()
        figure.legend(*lines, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    else:
        panels["losses"].legend(fontsize=7, frameon=False)
    return figure


def _draw_losses(ax, study: Study, everything: Groups, styles: Styles) -> None:
    tasks = {task.name: task for task in study.tasks}
    curves = {key: _curve(metrics(study.run(tasks[row["task"]])) for row in group) for key, group in everything.items()}
    base = next(
        (dict(zip(*curve, strict=True)) for key, curve in curves.items() if key[0] == study.recipe.baseline), {}
    )
    for key, curve in curves.items():
        points = [(step, loss / base.get(step, 1.0)) for step, loss in zip(*curve, strict=True)]
        ax.plot(*zip(*points, strict=True), linewidth=1.2, label=plot_label(*key), **styles[key])
    ax.set(xlabel="step", ylabel=f"denoising loss{f' / that of {_name(study.recipe.baseline)}' if base else ''}")
    ax.set_title(f"training, mean of the seeds and of {SMOOTH} logged values", fontsize=9)


def _draw_ends(ax, rows: Rows, first: str, everything: Groups, styles: Styles) -> None:
    scales = [name for name in evaluated(rows) if name.rpartition(", guidance ")[0] == EVALUATED + first]
    for i, (key, group) in enumerate(everything.items()):
        for k, name in enumerate(scales):
            values = [row[name] for row in group if row.get(name) is not None]
            place = [i + (k - (len(scales) - 1) / 2) * 0.25] * len(values)
            ax.plot(place, values, SHAPES[k % 4][0], color=styles[key]["color"], markersize=5, alpha=0.8)
    ax.set_xticks(range(len(everything)), [plot_label(*key) for key in everything], rotation=40, ha="right")
    ax.set_ylabel(literal(first), fontsize=8)
    shown = ", ".join(f"{SHAPES[k % 4][1]} {name.rpartition(' ')[2]}" for k, name in enumerate(scales))
    ax.set_title(f"each mark a seed; guidance: {shown}", fontsize=9)
    ax.tick_params(axis="x", labelsize=8)


def _draw_course(
    ax, curves: Curves, means: dict[tuple[str, tuple], dict[int, float]], styles: Styles, baseline: str | None
) -> None:
    base = next((mean for key, mean in means.items() if key[0] == baseline and len(mean) > 1), None)
    for key, mean in means.items():
        points = {step: value / base[step] for step, value in mean.items() if step in base} if base else mean
        if points:
            ax.plot(list(points), list(points.values()), linewidth=1.2, marker="o", markersize=3, **styles[key])
    title = f"over training, mean of the seeds; guidance {curves.guidance:g}"
    if base:  # figures fall by several times, and models differ by little of that
        ax.set_ylabel(f"{literal(curves.figure)}\n/ that of {_name(baseline)}", fontsize=8)
        title += f"; {_name(baseline)}: {', '.join(f'{value:.3g}' for value in base.values())}"
    else:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(PLAIN)
        ax.yaxis.set_minor_formatter(PLAIN)
        ax.tick_params(axis="y", which="minor", labelsize=7)
        ax.set_ylabel(literal(curves.figure), fontsize=8)
    ax.set_xlabel("step")
    ax.set_title(title, fontsize=9)


def plot_label(variant: str, point: tuple | None) -> str:
    """A group in words, for a plot."""
    return literal(model_name(variant, point))


def _name(variant: str | None) -> str:
    return "" if variant is None else literal(variant)


def _curve(runs: Iterable[list[dict]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all runs logged, and the mean of their losses, smoothed by `SMOOTH`."""
    losses = [
        {line["step"]: line[DENOISING_LOSS] for line in run if line.get(DENOISING_LOSS) is not None} for run in runs
    ]
    steps = np.array(sorted(set.intersection(*map(set, losses))))
    mean = np.array([[loss[step] for step in steps] for loss in losses]).mean(0)
    window = min(SMOOTH, len(steps))
    return steps[window - 1 :], np.convolve(mean, np.ones(window) / window, mode="valid")
