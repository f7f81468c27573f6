"""Plots of a study: paired differences, loss against experts and compute, load of the experts, cost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure

from megapromoe.io import atomic_write
from megapromoe.plot_lines import MAX_LINES, Curve, draw_curves, height_of, label_log_axis, name_ends
from megapromoe.plot_styles import MARKERS, Style
from megapromoe.plot_text import literal
from megapromoe.run_lines import DENOISING_LOSS
from megapromoe.studies.collect import LOSS, TAIL
from megapromoe.studies.difference_plot import draw_differences
from megapromoe.studies.evaluation_plots import draw_evaluations
from megapromoe.studies.fit import SPAN, PowerLaw
from megapromoe.studies.image_plots import Groups, Styles, draw_images, of_shared_seeds, plot_label, styles_of
from megapromoe.studies.json_files import metrics
from megapromoe.studies.study import Study
from megapromoe.studies.tables import EXPERTS, Rows, fits, groups, mean_of

LOSS_LABEL = "loss on fixed draws"
NEAR = 1.5  # ratio of largest to smallest; bars of memory that differ by less look equal


def draw_all(study: Study, rows: Rows, note: str = "") -> list[Path]:
    """Writes all plots that the rows allow as PNGs into the study's folder; returns their paths.

    Args:
        note: printed below the picture of cost, such as what machine it was.
    """
    pictures = {"differences": draw_differences(study, rows)}
    pictures |= {"loss_experts": draw_experts(study, rows), "loss_compute": draw_compute(study, rows)}
    pictures |= {"routing": draw_routing(study, rows), "cost": draw_cost(study, rows, note)}
    pictures |= {"images": draw_images(study, rows), "evaluations": draw_evaluations(study, rows)}
    paths = []
    for name, figure in pictures.items():
        if figure is not None:
            path = study.folder / f"{name}.png"
            with atomic_write(path) as file:
                figure.savefig(file, format="png", dpi=110)
            paths.append(path)
    return paths


def draw_experts(study: Study, rows: Rows) -> Figure | None:
    """Loss against experts: every run, means with 95 % intervals, supported laws; None without two E to compare."""
    if len({row["experts"] for row in rows if row["experts"]}) < 2:
        return None
    figure, (ax,) = _figure(1)
    laws, everything = fits(rows, study.recipe), groups(rows, study.recipe)
    lines: dict[tuple[str, tuple], list] = {}
    for (variant, point), group in everything.items():
        rest = tuple((axis, value) for axis, value in point if axis != EXPERTS)
        lines.setdefault((variant, rest), []).append((group[0]["experts"], [row[LOSS] for row in group]))
    counts = sorted({row["experts"] for row in rows if row["experts"]})
    labels, styles = [], _family_styles(study, everything, lines)
    for i, ((variant, rest), points) in enumerate(lines.items()):
        style, name = styles[variant, rest], plot_label(variant, rest)
        if points[0][0] is None:  # without experts: a horizontal line
            mean = mean_of(points[0][1])
            ax.axhline(mean.mean, label=name, linestyle=style.line, color=style.colour)
            if mean.half is not None:
                low, high = mean.mean - mean.half, mean.mean + mean.half
                ax.axhspan(low, high, alpha=0.12, linewidth=0, color=style.colour)
            continue
        # Side by side, so that intervals do not hide each other.
        x_factor = 1.035 ** (i - (len(lines) - 1) / 2)
        _points(ax, [(x * x_factor, losses) for x, losses in points], name, style)
        law = laws.get((variant, "experts", rest))
        if isinstance(law, PowerLaw) and not law.fit_warnings:
            _law(ax, law, counts[0], counts[-1], style)
        elif law is not None:
            labels.append(f"{name}: no power law, {law if isinstance(law, str) else law.fit_warnings[0]}")
    ax.set_xscale("log", base=2)
    ax.set_xticks(counts, [str(count) for count in counts])
    ax.minorticks_off()
    ax.set(xlabel="routed experts E", ylabel=LOSS_LABEL, title="Loss against experts, at equal active parameters")
    if study.recipe.active_parameters is None:
        ax.set_title("Loss against experts")
    _legend(ax, labels)
    return figure


def draw_compute(study: Study, rows: Rows) -> Figure | None:
    """Loss against operations: on the left along the training, on the right at the end of each run."""
    if not rows:
        return None
    spread = [row["training_flops"] for row in rows]
    varies = max(spread) >= SPAN * min(spread)
    everything, seeds = of_shared_seeds(groups(rows, study.recipe))
    heights = [height_of(len(everything)), 4.6]
    if not varies:  # at equal compute the second panel would show one x only
        figure, (left,) = _parts([heights[0]], stacked=True)
    else:
        figure, (left, right) = _parts(heights, stacked=len(everything) > MAX_LINES)
        _draw_ends(right.subplots(), study, rows)
    tasks, styles = {task.name: task for task in study.tasks}, styles_of(study, everything)
    lines = []
    for (variant, point), group in everything.items():
        curves = []
        for row in group:
            task = tasks[row["task"]]
            logged = [line for line in metrics(study.run(task)) if line.get(DENOISING_LOSS) is not None]
            per_step = task.flops / task.config.train.steps
            curves.append({line["step"] * per_step: line[DENOISING_LOSS] for line in logged})
        at = sorted(set.intersection(*(set(curve) for curve in curves)))
        mean = [float(np.mean([curve[x] for curve in curves])) for x in at]
        lines.append(Curve(at, mean, plot_label(variant, point), styles[variant, point]))

    def finish(ax: Axes) -> None:
        label_log_axis(ax, "x")
        label_log_axis(ax, "y")
        ax.set(xlabel="training operations so far (FLOPs)", ylabel=f"denoising loss in training ({seeds})")

    title = "Along the training" if varies else f"Along the training; {_equal_operations(min(spread), max(spread))}"
    name_ends(draw_curves(left, lines, title, finish))
    return figure


def _equal_operations(least: float, most: float) -> str:
    if most <= 1.0005 * least:
        return "all runs have the same number of operations"
    return f"the operations of the runs differ by at most {100 * (most / least - 1):.2g} %"


def _draw_ends(ax: Axes, study: Study, rows: Rows) -> None:
    """The loss of each run over its operations, and the laws through them."""
    laws, labels, everything = fits(rows, study.recipe), [], groups(rows, study.recipe)
    families: dict[tuple[str, tuple], list] = {}
    for (variant, point), group in everything.items():
        rest = tuple((axis, value) for axis, value in point if axis == EXPERTS)
        place = (group[0]["training_flops"], [row[LOSS] for row in group])
        families.setdefault((variant, rest), []).append(place)
    styles = _family_styles(study, everything, families)
    for i, ((variant, rest), points) in enumerate(families.items()):
        style = styles[variant, rest]
        x_factor = 1.04 ** (i - (len(families) - 1) / 2)  # side by side, so that intervals do not hide each other
        points = [(x * x_factor, losses) for x, losses in sorted(points)]
        _points(ax, points, plot_label(variant, rest), style)
        law = laws[variant, "training_flops", rest]
        if isinstance(law, PowerLaw) and not law.fit_warnings:
            _law(ax, law, points[0][0], points[-1][0], style)
        else:
            labels.append(law if isinstance(law, str) else law.fit_warnings[0])
    ax.set(xlabel="training operations of the run (FLOPs)", ylabel=LOSS_LABEL)
    label_log_axis(ax, "x")
    ax.set_title("At the end of each run", fontsize=10)
    reasons = dict.fromkeys(labels)
    _legend(ax, [f"no power law for {labels.count(reason)} of {len(families)}: {reason}" for reason in reasons])


def draw_routing(study: Study, rows: Rows) -> Figure | None:
    """Dead experts and load entropy over training, and the distribution of load over experts at its end."""
    rows = [row for row in rows if row["experts"]]
    if not rows:
        return None
    everything, seeds = of_shared_seeds(groups(rows, study.recipe))
    stacked = len(everything) > MAX_LINES
    figure, parts = _parts([height_of(len(everything), 4.6)] * 3, stacked=stacked)
    tasks, styles = {task.name: task for task in study.tasks}, styles_of(study, everything)
    lines: tuple[list[Curve], list[Curve], list[Curve]] = ([], [], [])
    for (variant, point), group in everything.items():
        shares, entropies, loads = [], [], []
        for row in group:
            task = tasks[row["task"]]
            logged = metrics(study.run(task))
            slots = len(task.config.model.moe_blocks) * task.config.model.num_experts
            shares.append({line["step"]: line["dead_experts"] / slots for line in logged if "dead_experts" in line})
            entropies.append({line["step"]: line["load_entropy"] for line in logged if "load_entropy" in line})
            loaded = [line for line in logged if "expert_load" in line]  # missing where no step was applied
            tail = [line["expert_load"] for line in loaded if line["step"] > (1 - TAIL) * task.config.train.steps]
            load_LE = np.sum(tail or [loaded[-1]["expert_load"]], axis=0)
            share_LE = load_LE / np.maximum(load_LE.sum(1, keepdims=True), 1)
            loads.append(-np.sort(-share_LE, axis=1).mean(0) * load_LE.shape[1])
        name, style = plot_label(variant, point), styles[variant, point]
        for measure, curves in zip(lines, (shares, entropies), strict=False):
            at = sorted(set.intersection(*(set(curve) for curve in curves)))
            measure.append(Curve(at, [float(np.mean([curve[x] for curve in curves])) for x in at], name, style))
        curve = np.mean(loads, axis=0)
        lines[2].append(Curve(list((np.arange(len(curve)) + 0.5) / len(curve)), list(curve), name, style))

    def finish_dead(ax: Axes) -> None:
        ax.set(xlabel="step", ylabel="share of experts that got no token", ylim=(-0.02, None))

    def finish_evenness(ax: Axes) -> None:
        ax.set(xlabel="step", ylabel="entropy of the load / log E  (1 is even)", ylim=(None, 1.01))

    def finish_load(ax: Axes) -> None:
        ax.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        ax.set(xlabel="experts, busiest first (share of E)", ylabel="load / even load", ylim=(0, None))

    draw_curves(parts[0], lines[0], "Dead experts, within each logged interval", finish_dead)
    draw_curves(parts[1], lines[1], "Evenness of the load", finish_evenness)
    panels = draw_curves(parts[2], lines[2], f"Load at the end, mean of layers; {seeds}", finish_load)
    if not stacked:
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", fontsize=8, frameon=False, handlelength=3.2)
    return figure


def draw_cost(study: Study, rows: Rows, note: str) -> Figure | None:
    """Parameters, speed and memory of each model."""
    if not rows:
        return None
    everything = groups(rows, study.recipe)
    names = [plot_label(variant, point) for variant, point in everything]
    figure, axes = _figure(3, 1.6 + 0.3 * len(names))
    styles = styles_of(study, everything)
    colours = [styles[key].colour for key in everything]
    scale, unit = (1e6, "million") if max(row["parameters"] for row in rows) >= 1e6 else (1e3, "thousand")
    wanted: tuple[tuple[str, float, str, str], ...] = (
        ("parameters", scale, f"parameters, {unit} (dark: active)", "Size"),
        ("images_per_second", 1, "images per second of training", "Speed"),
        ("memory_bytes", 2**20, "peak memory of rank 0 (MiB)", "Memory"),
    )
    place = np.arange(len(names))
    for ax, (key, divisor, label, title) in zip(axes, wanted, strict=True):
        values = [[row[key] / divisor for row in group if row[key] is not None] for group in everything.values()]
        means = [float(np.mean(v)) if v else math.nan for v in values]
        known = [value for v in values for value in v]
        # Bars start at 0. If all are nearly equal, marks on an axis with the range of the values show the differences.
        near = key == "memory_bytes" and bool(known) and max(known) < NEAR * min(known)
        if not near:
            ax.barh(place, means, color=colours, alpha=0.4 if key == "parameters" else 0.6)
        if key == "parameters":
            active = [group[0]["active_parameters"] / divisor for group in everything.values()]
            ax.barh(place, active, color=colours)
        else:
            for y, v, colour in zip(place, values, colours, strict=True):
                ax.plot(v, [y] * len(v), ".", color=colour if near else "0.15", markersize=6 if near else 3)
        if near:
            ax.plot(means, place, "|", color="0.15", markersize=11)
            ax.grid(axis="x", alpha=0.3)
            label += "; the axis does not start at 0"
        ends = [max([mean, *v]) for mean, v in zip(means, values, strict=True)]
        for y, mean, end in zip(place, means, ends, strict=True):
            if not math.isnan(mean):
                text = f"{mean:,.0f}" if mean >= 100 else f"{mean:.3g}"
                ax.annotate(text, (end, y), (5, 0), textcoords="offset points", va="center", fontsize=7)
        ax.margins(x=0.16)
        ax.set_ylim(-0.6, len(names) - 0.4)  # the same in all panels, whose rows are named once
        ax.set_yticks(place, names if ax is axes[0] else [""] * len(names), fontsize=8)
        ax.invert_yaxis()
        ax.set_xlabel(label, fontsize=9)
        ax.set_title(title, fontsize=10)
    if note:
        figure.text(0.995, 0.005, literal(note), ha="right", va="bottom", fontsize=7, color="0.35")
        figure.set_layout_engine("constrained", rect=(0, 0.035, 1, 0.965))
    return figure


def _parts(heights: list[float], stacked: bool) -> tuple[Figure, list[SubFigure]]:
    """A figure with panels: stacked, with these heights, or side by side, with the height of the first."""
    if stacked:
        figure = Figure(figsize=(12.0, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)
    else:
        figure = Figure(figsize=(1.5 + 5.5 * len(heights), heights[0]), layout="constrained")
        parts = figure.subfigures(1, len(heights), squeeze=False)
    FigureCanvasAgg(figure)
    return figure, list(parts.flatten())


def _figure(panels: int, height: float = 4.6) -> tuple[Figure, list]:
    figure = Figure(figsize=(1.5 + 5.0 * panels, height), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, which would keep all figures in memory
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _points(ax, points: list[tuple[float, list[float]]], name: str, style: Style) -> None:
    """Plots the mean with its interval, and each run as a small mark."""
    for x, losses in points:
        small = {"markersize": 5, "alpha": 0.6, "markeredgewidth": 0, "color": style.colour}
        ax.plot([x * 1.02] * len(losses), losses, ".", **small)
    means = [mean_of(losses) for _, losses in points]
    bars = [mean.half or 0 for mean in means]
    at = [x for x, _ in points]
    shown = {"linestyle": "none", "markersize": 6, "capsize": 3, "label": name, **style.of_marks}
    ax.errorbar(at, [m.mean for m in means], bars, **shown)


def _law(ax, law: PowerLaw, low: float, high: float, style: Style) -> None:
    x = np.geomspace(low, high, 100)
    lower, upper = law.band(x)
    ax.plot(x, law.at(x), linewidth=1.2, label=str(law), color=style.colour, linestyle=style.line)
    ax.fill_between(x, lower, upper, alpha=0.15, linewidth=0, color=style.colour)


def _family_styles(study: Study, everything: Groups, families: Iterable[tuple[str, tuple]]) -> Styles:
    """For groups put together along an axis: the colour of the first of each, as in other panels, and a marker."""
    styles = styles_of(study, everything)
    return {
        (variant, rest): replace(
            next(style for key, style in styles.items() if key[0] == variant and set(rest) <= set(key[1])),
            marker=MARKERS[number % len(MARKERS)],
        )
        for number, (variant, rest) in enumerate(families)
    }


def _legend(ax, notes: list[str] | tuple[str, ...] = ()) -> None:
    """Adds a legend outside the axes, with notes below it."""
    where = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0}
    columns = math.ceil(len(ax.get_legend_handles_labels()[1]) / 26)
    ax.legend(fontsize=8, frameon=False, handlelength=3.2, ncols=columns, **where)  # long enough for a line's style
    if notes:
        ax.text(0.0, -0.17, "\n".join(notes), transform=ax.transAxes, fontsize=7.5, color="0.35", va="top")
