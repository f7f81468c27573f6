"""Metrics of sampled images: means and intervals over the seeds of a study, as rows and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from megapromoe.studies import markdown
from megapromoe.studies.collect import EVALUATED
from megapromoe.studies.curves import titled
from megapromoe.studies.multiple_comparisons import count_in_words, warning
from megapromoe.studies.recipe import Recipe
from megapromoe.studies.tables import Mean, Rows, differences, evaluated, first_figure, groups, mean_of, model_name

TITLE = "## Sampled images, mean over seeds"


def mean_figures(figure_rows: Rows, recipe: Recipe) -> list[dict[str, Any]]:
    """A row for each model, step, guidance scale and metric, with the mean over its seeds and half the 95 % interval.

    Args:
        figure_rows: the `figures` of the tasks; each seed counts once.
    """
    rows = []
    for (variant, point), group in groups(figure_rows, recipe).items():
        places: dict[tuple, list[float]] = {}
        for row in group:
            place = (row["step"], row["guidance"], row["count"], row["figure"])
            places.setdefault(place, []).append(row["value"])
        for (step, guidance, count, figure), values in sorted(places.items()):
            mean = mean_of(values)
            what = {"step": step, "guidance": guidance, "count": count, "figure": figure, "seeds": mean.runs}
            rows.append({"variant": variant, **dict(point), **what, "mean": mean.mean, "half_interval": mean.half})
    return rows


def mean_sections(rows: Rows, recipe: Recipe, figure_rows: Rows) -> Iterable[str]:
    """Markdown tables of the first metric: for the last checkpoints at each guidance scale, and over training.

    Nothing where no model was evaluated with two seeds: the tables of each seed say all.

    Args:
        rows: of the tasks, as `collect.row` makes them.
        figure_rows: their `figures`.
    """
    first = first_figure(rows)
    means = [row for row in mean_figures(figure_rows, recipe) if titled(row) == first]
    if first is None or not any(row["seeds"] > 1 for row in means):
        return
    yield TITLE
    yield f"{first}: mean ± half of the 95 % interval over seeds (Student's t)."
    columns = [name for name in evaluated(rows) if name.rpartition(", guidance ")[0] == EVALUATED + first]
    pairs = _pairs(rows, recipe, columns)
    yield _last_table(rows, recipe, columns, pairs)
    names = [f"{model_name(*arm)} ({column.rpartition(', ')[2]})" for column, means in pairs.items() for arm in means]
    p_values = [mean.p for means in pairs.values() for mean in means.values()]
    yield from filter(None, (count_in_words(p_values), warning(names, p_values)))
    steps = sorted({row["step"] for row in means})
    for guidance in sorted({row["guidance"] for row in means}) if len(steps) > 1 else ():
        yield f"At guidance {guidance:g}, of the checkpoint of each step:"
        lines = [["model", *(f"step {step:,}" for step in steps)]]
        for variant, point in groups(figure_rows, recipe):
            cells = {row["step"]: row for row in means if _is_at(row, variant, point, guidance)}
            if cells:
                lines.append([model_name(variant, point), *(_cell(cells.get(step)) for step in steps)])
        yield markdown.table(lines)


def _pairs(rows: Rows, recipe: Recipe, columns: Sequence[str]) -> dict[str, dict[tuple[str, tuple | None], Mean]]:
    """Column -> model -> paired difference to the baseline, of single points; empty for a study without one."""
    pairs = {}
    for name in columns if recipe.baseline is not None else ():
        known = [row for row in rows if row.get(name) is not None]
        means = differences(known, recipe, recipe.baseline or "", name)
        pairs[name] = {arm: mean for arm, mean in means.items() if arm[1] is not None}
    return pairs


def _last_table(
    rows: Rows, recipe: Recipe, columns: Sequence[str], pairs: dict[str, dict[tuple[str, tuple | None], Mean]]
) -> str:
    """Last checkpoints: a row for each model, with the mean at each scale and the paired difference to the baseline."""
    baseline = recipe.baseline
    head = ["model"]
    for name in columns:
        head += [name.rpartition(", ")[2]] + ([f"minus {baseline}"] if baseline else [])
    lines = [head]
    for (variant, point), group in groups(rows, recipe).items():
        cells = [model_name(variant, point)]
        for name in columns:
            values = [row[name] for row in group if row.get(name) is not None]
            cells.append(in_words(mean_of(values)) if values else "-")
            if baseline is not None:
                difference = pairs[name].get((variant, point))
                cells.append("-" if difference is None else in_words(difference, "+"))
        lines.append(cells)
    return markdown.table(lines)


def in_words(mean: Mean, sign: str = "") -> str:
    """A mean with its interval, rounded to a sensible number of digits."""
    half = "" if mean.half is None else f" ± {mean.half:.2g}"
    return f"{mean.mean:{sign}.4g}{half}"


def _is_at(row: dict[str, Any], variant: str, point: tuple, guidance: float) -> bool:
    same = row["variant"] == variant and row["guidance"] == guidance
    return same and all(row.get(axis) == value for axis, value in point)


def _cell(row: dict[str, Any] | None) -> str:
    return "-" if row is None else in_words(Mean(row["mean"], row["half_interval"], row["seeds"]))
