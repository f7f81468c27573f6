"""The main picture of a study: the paired difference of each model to the baseline, with the noise floor as a band."""

from __future__ import annotations

import math
import statistics

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megapromoe.evaluation.names import higher_is_better
from megapromoe.plot_styles import BASELINE_COLOUR
from megapromoe.plot_text import literal
from megapromoe.studies.collect import EVALUATED, LOSS, TRAINING_LOSS
from megapromoe.studies.image_plots import Styles, plot_label, styles_of
from megapromoe.studies.noise import NoiseFloor, metric_name, noise_floor, values_of
from megapromoe.studies.seed_statistics import Rows, groups, mean_of, paired_differences
from megapromoe.studies.study import Study
from megapromoe.studies.tables import evaluated, first_figure

PANELS = 4  # metrics in the picture
ONE_PAIR, MEAN = "0.90", "0.78"  # greys of the bands
Pairs = dict[tuple[str, tuple], dict[int, float]]


def draw_differences(study: Study, rows: Rows) -> Figure | None:
    """A panel for each metric, a row for each model; None if no model has a run on the same seed as the baseline.

    Dots are the differences of the seeds, the mark their mean with its 95 % interval. The light band is what a single
    pair exceeds by chance in 5 % of cases, the dark one what a mean over as many seeds as the models have exceeds.
    Models are sorted by the difference of the loss.
    """
    against = study.recipe.baseline or study.recipe.variants[0].name
    panels: list[tuple[str, Pairs, NoiseFloor | None]] = []
    for metric in shown_metrics(rows):
        pairs = pairs_of(study, rows, against, metric)
        if pairs:
            panels.append((metric, pairs, noise_floor(metric, values_of(rows, study.recipe, metric))))
    if not panels:
        return None
    means = {arm: statistics.fmean(seeds.values()) for arm, seeds in panels[0][1].items()}
    arms = sorted(means, key=lambda arm: means[arm])
    figure = Figure(figsize=(2.4 + 3.9 * len(panels), 1.9 + 0.34 * len(arms)), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, which would keep all figures in memory
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    styles = styles_of(study, groups(rows, study.recipe))
    for ax, (metric, pairs, floor) in zip(axes, panels, strict=True):
        _draw_panel(ax, arms, pairs, floor, styles)
        better = "higher" if higher_is_better(metric.removeprefix(EVALUATED)) else "lower"
        name = literal(metric_name(metric)).replace(", guidance", ",\nguidance").replace(" (", "\n(")
        ax.set_xlabel(f"{name}\nminus that of {literal(against)} ({better} is better)", fontsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.tick_params(axis="x", labelsize=8)
    axes[0].set_yticks(range(len(arms)), [plot_label(*arm) for arm in arms], fontsize=8)
    axes[0].set_ylim(len(arms) - 0.4, -0.6)
    figure.suptitle(_title(literal(against), panels), fontsize=9)
    return figure


def shown_metrics(rows: Rows) -> list[str]:
    """The metrics with a panel: loss and training loss, and the first metric of images at up to two guidance scales."""
    first = first_figure(rows)
    of_images = [name for name in evaluated(rows) if name.rpartition(", guidance ")[0] == f"{EVALUATED}{first}"]
    return [LOSS, TRAINING_LOSS, *of_images][:PANELS]


def pairs_of(study: Study, rows: Rows, against: str, metric: str) -> Pairs:
    """Model -> seed -> difference to the baseline."""
    known = [row for row in rows if row.get(metric) is not None]
    pairs = paired_differences(known, study.recipe, against, metric)
    return {(variant, point): seeds for (variant, point), seeds in pairs.items() if point is not None}


def _draw_panel(ax: Axes, arms: list, pairs: Pairs, floor: NoiseFloor | None, styles: Styles) -> None:
    if floor is not None and floor.pair is not None:
        limit, seeds = floor.pair.limit, max(map(len, pairs.values()))
        ax.axvspan(-limit, limit, color=ONE_PAIR, linewidth=0, zorder=0, label="one pair")
        half = limit / math.sqrt(seeds)
        ax.axvspan(-half, half, color=MEAN, linewidth=0, zorder=0.1, label=f"mean of {seeds} pairs")
    ax.axvline(0, color=BASELINE_COLOUR, linewidth=1.0, zorder=1)
    limit = floor.pair.limit if floor is not None and floor.pair is not None else 0.0
    shown, ends = [-limit, limit], [0.0]
    for place, arm in enumerate(arms):
        if arm not in pairs:
            continue
        values, style = list(pairs[arm].values()), styles[arm]
        mean = mean_of(values)
        ax.plot(values, [place + 0.22] * len(values), ".", color=style.colour, markersize=5, alpha=0.7)
        ax.errorbar(mean.mean, place, xerr=mean.half, linestyle="none", markersize=6, capsize=3, **style.of_marks)
        shown += values
        ends += [mean.mean - (mean.half or 0), mean.mean + (mean.half or 0)]
    # Intervals of two seeds are wide and may leave the panel, which shows all dots and the bands.
    wide = 3 * max(map(abs, shown))
    low, high = max(min(*shown, *ends), -wide), min(max(*shown, *ends), wide)
    margin = 0.05 * (high - low) or 1.0
    ax.set_xlim(low - margin, high + margin)
    ax.grid(axis="y", alpha=0.25)


def _title(against: str, panels: list[tuple[str, Pairs, NoiseFloor | None]]) -> str:
    seeds = max(len(values) for _, pairs, _ in panels for values in pairs.values())
    text = f"Paired differences to {against}. Dots: seeds; marks: means with 95 % intervals"
    if any(floor is not None and floor.pair is not None for _, _, floor in panels):
        text += f"\nShaded: exceeded by chance in 5 % of cases, by one pair (light) and by the mean of {seeds} (dark)"
    return text
