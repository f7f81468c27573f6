"""Plots training loss, and metrics of sampled images at the end of training and over training."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure

from megapromoe.evaluation.names import higher_is_better
from megapromoe.plot_lines import MAX_LINES, Curve, draw_curves, height_of, label_log_axis, name_ends, number
from megapromoe.plot_styles import Style, assign_families
from megapromoe.plot_text import literal
from megapromoe.run_lines import DENOISING_LOSS
from megapromoe.studies.collect import EVALUATED
from megapromoe.studies.curves import Curves, curves_of, figures
from megapromoe.studies.json_files import metrics
from megapromoe.studies.study import Study
from megapromoe.studies.tables import Rows, evaluated, first_figure, groups, model_name

SHAPES = (("o", "circles"), ("s", "squares"), ("^", "triangles"), ("D", "diamonds"))
SMOOTH = 3  # number of logged values over which loss curves are averaged

Groups = dict[tuple[str, tuple], list[dict]]
Styles = dict[tuple[str, tuple], Style]


def draw_images(study: Study, rows: Rows) -> Figure | None:
    """Training loss over steps, and the first evaluated metric at each guidance scale; None without results.

    A third panel shows the figure over training, if all seeds of some model were evaluated at two steps or more. Curves
    over steps are means of the seeds that all models have. Where the recipe names a baseline, they are shown as
    multiples of the baseline's at the same step.
    """
    first = first_figure(rows)
    if first is None:
        return None
    everything = groups(rows, study.recipe)
    shared, seeds = of_shared_seeds(everything)
    styles = styles_of(study, everything)
    done = {row["task"] for row in rows}
    curves = curves_of((row for task in study.tasks if task.name in done for row in figures(study, task)), first)
    means = {key: curves.mean([row["task"] for row in group]) for key, group in shared.items()} if curves else {}
    third = any(len(mean) > 1 for mean in means.values())

    panels: dict[str, Axes | SubFigure]
    if len(everything) > MAX_LINES:  # small multiples, one below the other
        names = ["losses", "course", "ends"] if third else ["losses", "ends"]
        heights = [1.0 + 0.2 * len(everything) if name == "ends" else height_of(len(everything)) for name in names]
        figure = Figure(figsize=(11.5, sum(heights)), layout="constrained")
        parts = list(figure.subfigures(len(names), 1, squeeze=False, height_ratios=heights).flatten())
        panels = {**dict(zip(names, parts, strict=True)), "ends": parts[-1].subplots()}
    else:  # panels over steps are side by side
        figure = Figure(figsize=(13.0, 9.2 if third else 5.2), layout="constrained")
        panels = dict(
            figure.subplot_mosaic([["losses", "course"], ["ends", "ends"]] if third else [["losses", "ends"]])
        )
    FigureCanvasAgg(figure)  # without pyplot, which would keep all figures in memory
    drawn = [_draw_losses(panels["losses"], study, shared, styles, seeds)]
    _draw_ends(panels["ends"], rows, first, everything, styles)
    if third and curves is not None:
        drawn.append(_draw_course(panels["course"], curves, means, styles, study.recipe.baseline, seeds))
    for axes in drawn:
        name_ends(axes)
    return figure


def styles_of(study: Study, keys: Iterable[tuple[str, tuple]]) -> Styles:
    """A style for each group of runs; black is the recipe's baseline, else a variant without experts."""
    baseline = study.recipe.baseline
    if baseline is None:
        dense = [task.variant for task in study.tasks if task.config.model.router == "dense"]
        baseline = dense[0] if dense else None
    return assign_families(list(keys), baseline)


def of_shared_seeds(everything: Groups) -> tuple[Groups, str]:
    """The rows of the seeds that every model has, so that their means compare the same seeds, and words for a title.

    All rows if there is no such seed.
    """
    seeds = [{row["seed"] for row in group} for group in everything.values()]
    shared = set.intersection(*seeds) if seeds else set()
    if not shared:
        return everything, "mean of the seeds that each model has"
    kept = {key: [row for row in group if row["seed"] in shared] for key, group in everything.items()}
    return kept, f"mean of {len(shared)} seeds" if len(shared) > 1 else f"seed {min(shared)}"


def _draw_losses(place: Axes | SubFigure, study: Study, everything: Groups, styles: Styles, seeds: str) -> list[Axes]:
    tasks = {task.name: task for task in study.tasks}
    curves = {key: _curve(metrics(study.run(tasks[row["task"]])) for row in group) for key, group in everything.items()}
    base = next(
        (dict(zip(*curve, strict=True)) for key, curve in curves.items() if key[0] == study.recipe.baseline), {}
    )
    lines = []
    for key, (steps, losses) in curves.items():
        relative = [loss / base.get(step, 1.0) for step, loss in zip(steps, losses, strict=True)]
        lines.append(Curve(list(steps), relative, plot_label(*key), styles[key]))
    label = f"denoising loss{f' / that of {_name(study.recipe.baseline)}' if base else ''}"
    title = f"training, {seeds}; smoothed over {SMOOTH} logged values"
    return draw_curves(place, lines, title, lambda ax: ax.set(xlabel="step", ylabel=label))


def _draw_ends(ax, rows: Rows, first: str, everything: Groups, styles: Styles) -> None:
    scales = [name for name in evaluated(rows) if name.rpartition(", guidance ")[0] == EVALUATED + first]
    for i, (key, group) in enumerate(everything.items()):
        for k, name in enumerate(scales):
            values = [row[name] for row in group if row.get(name) is not None]
            place = [i + (k - (len(scales) - 1) / 2) * 0.25] * len(values)
            ax.plot(values, place, SHAPES[k % 4][0], color=styles[key].colour, markersize=5, alpha=0.8)
    ax.set_yticks(
        range(len(everything)), [plot_label(*key) for key in everything]
    )  # horizontal bars leave room for the names
    ax.invert_yaxis()
    ax.set_xlabel(literal(first), fontsize=8)
    ax.grid(alpha=0.3)
    shown = ", ".join(f"{SHAPES[k % 4][1]} {name.rpartition(' ')[2]}" for k, name in enumerate(scales))
    ax.set_title(f"each mark a seed; guidance: {shown}", fontsize=9)
    ax.tick_params(axis="y", labelsize=8)


def _draw_course(
    place: Axes | SubFigure,
    curves: Curves,
    means: dict[tuple[str, tuple], dict[int, float]],
    styles: Styles,
    baseline: str | None,
    seeds: str,
) -> list[Axes]:
    base = next((mean for key, mean in means.items() if key[0] == baseline and len(mean) > 1), None)
    is_score = higher_is_better(curves.figure)
    if is_score:  # shares are comparable as they are, and may be 0
        base = None
    lines = []
    for key, mean in means.items():
        points = {step: value / base[step] for step, value in mean.items() if step in base} if base else mean
        if points:
            lines.append(Curve(list(points), list(points.values()), plot_label(*key), styles[key]))
    title = f"over training, {seeds}; guidance {curves.guidance:g}"
    label = literal(curves.figure)
    if base:  # relative to the baseline: metrics fall by a large factor, while models differ little
        label += f"\n/ that of {_name(baseline)}"
        title += f"; {_name(baseline)}: {', '.join(number(value) for value in base.values())}"

    def finish(ax: Axes) -> None:
        ax.set_xlabel("step")
        ax.set_ylabel(label, fontsize=8)
        if not base and not is_score:
            label_log_axis(ax, "y")

    return draw_curves(place, lines, title, finish)


def plot_label(variant: str, point: tuple | None) -> str:
    """Label of a group in a plot."""
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
