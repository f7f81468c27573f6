"""The pictures of a study: loss against experts and compute, the routers' load, cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megapromoe.io import atomic_write
from megapromoe.plot_text import literal
from megapromoe.run_lines import DENOISING_LOSS
from megapromoe.studies.collect import LOSS, TAIL
from megapromoe.studies.evaluation_plots import draw_evaluations
from megapromoe.studies.fit import SPAN, PowerLaw
from megapromoe.studies.image_plots import COLOURS, PLAIN, draw_images, plot_label
from megapromoe.studies.json_files import metrics
from megapromoe.studies.study import Study
from megapromoe.studies.tables import EXPERTS, Rows, fits, groups, mean_of

MARKERS = "osD^vP*X<>"
LOSS_LABEL = "loss on fixed draws"


def draw_all(study: Study, rows: Rows, note: str = "") -> list[Path]:
    """Draws what the rows allow, as PNGs in the study's folder; returns their paths.

    Args:
        note: printed below the picture of cost, such as what machine it was.
    """
    pictures = {"loss_experts": draw_experts(study, rows), "loss_compute": draw_compute(study, rows)}
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
    laws = fits(rows, study.recipe)
    lines: dict[tuple[str, tuple], list] = {}
    for (variant, point), group in groups(rows, study.recipe).items():
        rest = tuple((axis, value) for axis, value in point if axis != EXPERTS)
        lines.setdefault((variant, rest), []).append((group[0]["experts"], [row[LOSS] for row in group]))
    counts = sorted({row["experts"] for row in rows if row["experts"]})
    labels = []
    for i, ((variant, rest), points) in enumerate(lines.items()):
        style = {"color": COLOURS[i % 10]}
        name = plot_label(variant, rest)
        if points[0][0] is None:  # no experts: a level, across all
            mean = mean_of(points[0][1])
            ax.axhline(mean.mean, label=name, linestyle="--", **style)
            if mean.half is not None:
                ax.axhspan(mean.mean - mean.half, mean.mean + mean.half, alpha=0.12, linewidth=0, **style)
            continue
        # Side by side, so that intervals do not hide each other.
        aside = 1.035 ** (i - (len(lines) - 1) / 2)
        _points(ax, [(x * aside, losses) for x, losses in points], name, MARKERS[i % 10], style)
        law = laws.get((variant, "experts", rest))
        if isinstance(law, PowerLaw) and not law.doubts:
            _law(ax, law, counts[0], counts[-1], style)
        elif law is not None:
            labels.append(f"{name}: no power law, {law if isinstance(law, str) else law.doubts[0]}")
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
    figure, (left, *others) = _figure(2 if varies else 1)
    everything = groups(rows, study.recipe)
    tasks = {task.name: task for task in study.tasks}
    shades = _shades(study, everything)
    for (variant, point), group in everything.items():
        curves = []
        for row in group:
            task = tasks[row["task"]]
            lines = [line for line in metrics(study.run(task)) if line.get(DENOISING_LOSS) is not None]
            per_step = task.flops / task.config.train.steps
            curves.append({line["step"] * per_step: line[DENOISING_LOSS] for line in lines})
        at = sorted(set.intersection(*(set(curve) for curve in curves)))
        mean = [float(np.mean([curve[x] for curve in curves])) for x in at]
        left.plot(at, mean, linewidth=1.1, label=plot_label(variant, point), **shades[variant, point])
    left.set_xscale("log")
    left.set_yscale("log")
    left.set(xlabel="training operations so far (FLOPs)", ylabel="denoising loss in training (mean over seeds)")
    left.yaxis.set_major_formatter(PLAIN)
    left.yaxis.set_minor_formatter(PLAIN)
    left.tick_params(axis="y", which="minor", labelsize=7)
    left.set_title("Along the training", fontsize=10)
    if not varies:  # at equal compute there is nothing to see of the runs' ends
        _legend(left, [f"all runs have nearly equal operations, within a factor of {max(spread) / min(spread):.3g}"])
        return figure
    (right,) = others
    laws, labels = fits(rows, study.recipe), []
    families: dict[tuple[str, tuple], list] = {}
    for (variant, point), group in everything.items():
        rest = tuple((axis, value) for axis, value in point if axis == EXPERTS)
        place = (group[0]["training_flops"], [row[LOSS] for row in group])
        families.setdefault((variant, rest), []).append(place)
    for i, ((variant, rest), points) in enumerate(families.items()):
        shade = [shades[key]["color"] for key in shades if key[0] == variant and set(rest) <= set(key[1])][-1]
        aside = 1.04 ** (i - (len(families) - 1) / 2)  # side by side, so that intervals do not hide each other
        points = [(x * aside, losses) for x, losses in sorted(points)]
        _points(right, points, plot_label(variant, rest), MARKERS[i % 10], {"color": shade})
        law = laws[variant, "training_flops", rest]
        if isinstance(law, PowerLaw) and not law.doubts:
            _law(right, law, points[0][0], points[-1][0], {"color": shade})
        else:
            labels.append(law if isinstance(law, str) else law.doubts[0])
    right.set(xlabel="training operations of the run (FLOPs)", ylabel=LOSS_LABEL)
    right.set_xscale("log")
    right.tick_params(axis="x", which="minor", labelsize=7)
    right.set_title("At the end of each run", fontsize=10)
    reasons = dict.fromkeys(labels)
    _legend(right, [f"no power law for {labels.count(reason)} of {len(families)}: {reason}" for reason in reasons])
    return figure


def draw_routing(study: Study, rows: Rows) -> Figure | None:
    """Dead experts and evenness along the training, and how the load lies over the experts at its end."""
    rows = [row for row in rows if row["experts"]]
    if not rows:
        return None
    figure, (dead, even, load) = _figure(3)
    everything = groups(rows, study.recipe)
    tasks, shades = {task.name: task for task in study.tasks}, _shades(study, everything)
    for (variant, point), group in everything.items():
        style = shades[variant, point]
        shares, entropies, loads = [], [], []
        for row in group:
            task = tasks[row["task"]]
            lines = metrics(study.run(task))
            slots = len(task.config.model.moe_blocks) * task.config.model.num_experts
            shares.append({line["step"]: line["dead_experts"] / slots for line in lines if "dead_experts" in line})
            entropies.append({line["step"]: line["load_entropy"] for line in lines if "load_entropy" in line})
            loaded = [line for line in lines if "expert_load" in line]  # missing where no step was applied
            tail = [line["expert_load"] for line in loaded if line["step"] > (1 - TAIL) * task.config.train.steps]
            load_LE = np.sum(tail or [loaded[-1]["expert_load"]], axis=0)
            share_LE = load_LE / np.maximum(load_LE.sum(1, keepdims=True), 1)
            loads.append(-np.sort(-share_LE, axis=1).mean(0) * load_LE.shape[1])
        name = plot_label(variant, point)
        for ax, curves in ((dead, shares), (even, entropies)):
            at = sorted(set.intersection(*(set(curve) for curve in curves)))
            ax.plot(at, [np.mean([curve[x] for curve in curves]) for x in at], linewidth=1.1, label=name, **style)
        curve = np.mean(loads, axis=0)
        load.plot((np.arange(len(curve)) + 0.5) / len(curve), curve, linewidth=1.3, label=name, **style)
    dead.set(xlabel="step", ylabel="share of experts that got no token", ylim=(-0.02, None))
    dead.set_title("Dead experts, within each logged stretch", fontsize=10)
    even.set(xlabel="step", ylabel="entropy of the load / log E  (1 is even)", ylim=(None, 1.01))
    even.set_title("Evenness of the load", fontsize=10)
    load.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    load.set(xlabel="experts, busiest first (share of E)", ylabel="load / even load", ylim=(0, None))
    load.set_title("Load at the end, mean of layers and seeds", fontsize=10)
    _legend(load)
    return figure


def draw_cost(study: Study, rows: Rows, note: str) -> Figure | None:
    """What each model costs: parameters, speed, memory."""
    if not rows:
        return None
    everything = groups(rows, study.recipe)
    names = [plot_label(variant, point) for variant, point in everything]
    figure, axes = _figure(3, 1.6 + 0.3 * len(names))
    shades = _shades(study, everything)
    colours = [shades[key]["color"] for key in everything]
    scale, unit = (1e6, "million") if max(row["parameters"] for row in rows) >= 1e6 else (1e3, "thousand")
    wanted: tuple[tuple[str, float, str, str], ...] = (
        ("parameters", scale, f"parameters, {unit} (dark: active)", "Size"),
        ("images_per_second", 1, "images per second of training", "Speed"),
        ("memory_bytes", 2**20, "peak memory of rank 0 (MiB)", "Memory"),
    )
    place = np.arange(len(names))
    for ax, (key, one, label, title) in zip(axes, wanted, strict=True):
        values = [[row[key] / one for row in group if row[key] is not None] for group in everything.values()]
        means = [float(np.mean(v)) if v else math.nan for v in values]
        ax.barh(place, means, color=colours, alpha=0.45 if key == "parameters" else 0.8)
        if key == "parameters":
            active = [group[0]["active_parameters"] / one for group in everything.values()]
            ax.barh(place, active, color=colours)
        else:
            for y, v in zip(place, values, strict=True):
                ax.plot(v, [y] * len(v), ".", color="black", markersize=3)
        ax.set_yticks(place, names if ax is axes[0] else [""] * len(names), fontsize=8)
        ax.invert_yaxis()
        ax.set_xlabel(label)
        ax.set_title(title, fontsize=10)
    if note:
        figure.text(0.995, 0.005, literal(note), ha="right", va="bottom", fontsize=7, color="0.35")
        figure.set_layout_engine("constrained", rect=(0, 0.035, 1, 0.965))
    return figure


def _figure(panels: int, height: float = 4.6) -> tuple[Figure, list]:
    figure = Figure(figsize=(1.5 + 5.0 * panels, height), layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own: pyplot would keep a list of all figures
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _points(ax, points: list[tuple[float, list[float]]], name: str, marker: str, style: dict[str, Any]) -> None:
    """The mean with its interval, and beside it each run, small."""
    for x, losses in points:
        ax.plot([x * 1.02] * len(losses), losses, ".", markersize=5, alpha=0.6, markeredgewidth=0, **style)
    means = [mean_of(losses) for _, losses in points]
    bars = [mean.half or 0 for mean in means]
    at = [x for x, _ in points]
    ax.errorbar(at, [m.mean for m in means], bars, fmt=marker, markersize=6, capsize=3, label=name, **style)


def _law(ax, law: PowerLaw, low: float, high: float, style: dict[str, Any]) -> None:
    x = np.geomspace(low, high, 100)
    lower, upper = law.band(x)
    ax.plot(x, law.at(x), linewidth=1.2, label=str(law), **style)
    ax.fill_between(x, lower, upper, alpha=0.15, linewidth=0, **style)


def _shades(study: Study, everything: dict) -> dict[tuple[str, tuple], dict[str, Any]]:
    """A colour for each variant, darker along its points."""
    variants = [variant.name for variant in study.recipe.variants]
    shades = {}
    for i, variant in enumerate(variants):
        own = [key for key in everything if key[0] == variant]
        for j, key in enumerate(own):
            strength = 1.0 if len(own) == 1 else 0.35 + 0.65 * j / (len(own) - 1)
            colour = tuple(1 - strength * (1 - channel) for channel in COLOURS[i % 10])
            shades[key] = {"color": colour, "linestyle": "--" if not key[1] and len(everything) > 1 else "-"}
    return shades


def _legend(ax, notes: list[str] | tuple[str, ...] = ()) -> None:
    """Beside the axes, where it hides nothing; notes below it."""
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, borderaxespad=0)
    if notes:
        ax.text(0.0, -0.17, "\n".join(notes), transform=ax.transAxes, fontsize=7.5, color="0.35", va="top")
