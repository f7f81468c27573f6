"""The tables of a study: CSV with a line for each run, Markdown with means, differences and fits."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from megapromoe.checkpoint.average import WARN_ABOVE
from megapromoe.checkpoint.weights import is_average
from megapromoe.number_text import significant
from megapromoe.studies import layouts, markdown
from megapromoe.studies.collect import EVALUATED, LOSS, TRAINING_LOSS
from megapromoe.studies.curves import curves_of
from megapromoe.studies.fit import FitError, PowerLaw, fit_power_law
from megapromoe.studies.multiple_comparisons import adjusted, count_in_words, p_in_words, warning
from megapromoe.studies.recipe import Recipe
from megapromoe.studies.seed_statistics import EXPERTS, Mean, Rows, differences, groups, mean_of, trends


def fits(rows: Rows, recipe: Recipe, key: str = LOSS) -> dict[tuple[str, str, tuple], PowerLaw | str]:
    """Power laws: (variant, "experts" or "training_flops", the other axes) -> the law, or why there is none.

    Against experts, all else equal; against compute, at each number of experts, over all other axes.
    """
    families: dict[tuple[str, str, tuple], list[dict]] = {}
    for (variant, point), group in groups(rows, recipe).items():
        others = tuple((axis, value) for axis, value in point if axis != EXPERTS)
        experts = tuple((axis, value) for axis, value in point if axis == EXPERTS)
        if experts:
            families.setdefault((variant, "experts", others), []).extend(group)
        families.setdefault((variant, "training_flops", experts), []).extend(group)
    laws: dict[tuple[str, str, tuple], PowerLaw | str] = {}
    for (variant, x, rest), family in families.items():
        try:
            values, losses = (np.array([row[name] for row in family], dtype=float) for name in (x, key))
            laws[variant, x, rest] = fit_power_law(values, losses)
        except FitError as error:
            laws[variant, x, rest] = str(error)
    return laws


def to_csv(rows: Rows) -> str:
    """CSV with a line for each row; missing values are empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _exact(value) for name, value in row.items()})
    return text.getvalue()


def to_markdown(
    rows: Rows,
    recipe: Recipe,
    missing: Sequence[str],
    against: Sequence[str],
    evaluations: Rows = (),
    means: Iterable[str] = (),
    noise: Iterable[str] = (),
) -> str:
    """The study as Markdown: `sections`, joined."""
    return "\n\n".join(sections(rows, recipe, missing, against, evaluations, means, noise)) + "\n"


def _initial(rows: Rows, recipe: Recipe) -> str:
    """A sentence on the largest share of initial weights in the averages; "" if it is unknown for a run."""
    shares = [row.get("initial_share") for row in rows]
    known = [share for share in shares if share is not None]
    if not is_average(recipe.weights) or len(known) < len(shares):
        return ""
    too_much = ": too much, use `weights: master` in the recipe" if max(known) > WARN_ABOVE else ""
    return f" Of the averaged weights at most {max(known):.1%} are still the initial ones{too_much}."


def sections(
    rows: Rows,
    recipe: Recipe,
    missing: Sequence[str],
    against: Sequence[str],
    evaluations: Rows = (),
    means: Iterable[str] = (),
    noise: Iterable[str] = (),
) -> Iterable[str]:
    """Parts of the study's Markdown page, in order.

    Args:
        rows: of results.csv, one for each task that is done.
        missing: names of the tasks that are not done.
        against: variants with which the others are compared.
        evaluations: figures of images, one row for each task, step and guidance scale.
        means: further sections, on the means of `evaluations` over seeds.
        noise: sections on the noise floor, which come first.
    """
    splits = ", ".join(sorted({row["split"] for row in rows}))
    yield "# Results"
    yield f"{len(rows)} runs are done" + (f", {len(missing)} are missing: {', '.join(missing)}." if missing else ".")
    if not rows:
        return
    yield from noise
    yield "## Models"
    yield (
        f"Loss: of the {recipe.weights} weights on fixed draws of record, noise and time, the same for all runs"
        f" (split: {splits}).{_initial(rows, recipe)} Training loss: the denoising loss without auxiliary losses, mean"
        " over the last tenth of the steps. ± is half of the 95 % interval over seeds (Student's t). GPU-hours: of the"
        " training of one run, times its ranks."
        f"{layouts.note(rows)}"
    )
    yield markdown.table(_mean_lines(rows, recipe))
    yield from _evaluated_sections(rows, recipe)
    yield from _over_training(rows, recipe, evaluations)
    yield from means
    for name in against:
        means_of_pairs = {model_name(*place): d for place, d in differences(rows, recipe, name).items()}
        if means_of_pairs:
            yield f"## Against {name}, on the same stream"
            yield "Mean over seeds of the difference of each pair, with its 95 % interval."
            yield from _comparisons(means_of_pairs, f"loss minus that of {name}", "differs")
    slopes = {model_name(*place): slope for place, slope in trends(rows, recipe).items()}
    if slopes:
        yield "## Trend over experts"
        yield "Slope of each seed's line over log2 E, mean and 95 % interval over seeds."
        yield from _comparisons(slopes, "change of the loss with each doubling of the experts", "differs from 0")
    yield "## Power laws, L = a + b x^-c"
    lines: list[list[Any]] = [["model", "x", "a", "b", "c", "95 % of c", "supported"]]
    reasons: dict[tuple[str, str], list[str]] = {}
    for (variant, x, rest), law in fits(rows, recipe).items():
        name = model_name(variant, rest)
        if isinstance(law, str):
            reasons.setdefault((x, law), []).append(name)
        elif law.fit_warnings:
            lines.append([name, x, "-", "-", "-", "-", f"no: {'; '.join(law.fit_warnings)}"])
        else:
            numbers = [f"{law.a:.4f}", f"{law.b:.3g}", f"{law.c:.3g}", "{:.2g} to {:.2g}".format(*law.c_interval)]
            lines.append([name, x, *numbers, "yes"])
    if len(lines) > 1:
        yield markdown.table(lines)
    for (x, reason), names in reasons.items():
        yield f"None against {x} for {', '.join(names)}: {reason}."


def _comparisons(means: Mapping[str, Mean], title: str, verdict: str) -> Iterable[str]:
    """A table of means that are compared with 0, what many comparisons make of them, and a warning if one is due."""
    p_values = [mean.p for mean in means.values()]
    lines: list[list[Any]] = [["model", title, "seeds", verdict, "p", "p, Holm"]]
    for (name, mean), p, q in zip(means.items(), p_values, adjusted(p_values), strict=True):
        lines.append([name, f"{mean:+}", mean.runs, _verdict(mean), p_in_words(p), p_in_words(q)])
    yield markdown.table(lines)
    yield from filter(None, (count_in_words(p_values), warning(list(means), p_values)))


def _verdict(mean: Mean) -> str:
    return "-" if mean.half is None else "yes" if mean.differs else "no"


def model_name(variant: str, point: tuple | None) -> str:
    """Name of a group in tables."""
    if point is None:
        return f"{variant}, mean of its points"
    return " ".join([variant, *(f"{axis.rpartition('.')[2]}={_short(value)}" for axis, value in point)])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def evaluated(rows: Rows) -> list[str]:
    """Names of the columns with metrics of sampled images."""
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith(EVALUATED)))


def _evaluated_sections(rows: Rows, recipe: Recipe) -> Iterable[str]:
    """A table for each network, number of images and guidance scale."""
    tables: dict[str, list[tuple[str, str]]] = {}  # what was drawn -> pairs of a column and its metric
    for name in evaluated(rows):
        metric, drawn = _metric_and_images(name.removeprefix(EVALUATED))
        tables.setdefault(drawn, []).append((name, metric))
    for drawn, columns in tables.items():
        names = [name for name, _ in columns]
        yield f"Images sampled from the last checkpoints: {drawn}; the metric of each seed."
        lines = [["model", *(metric for _, metric in columns)]]
        for (variant, point), group in groups(rows, recipe).items():
            values = [[row[name] for row in group if row.get(name) is not None] for name in names]
            lines.append([model_name(variant, point), *(_of_images(v) for v in values)])
        yield markdown.table(lines)


def _metric_and_images(name: str) -> tuple[str, str]:
    """The metric in the name of a column, and on which images: "FID (inception), 50,000 images, guidance 1.5"."""
    metric, _, rest = name.partition(" (")
    if rest:
        network, _, drawn = rest.partition("), ")
        return metric, f"{drawn}, features of {network}"
    metric, images, guidance = name.rsplit(", ", 2)
    return metric, f"{images}, {guidance}"


def first_figure(rows: Rows) -> str | None:
    """The first of the evaluated figures, without its guidance scale; None where nothing is evaluated."""
    return next((name.removeprefix(EVALUATED).rpartition(", guidance ")[0] for name in evaluated(rows)), None)


def _over_training(rows: Rows, recipe: Recipe, evaluations: Rows) -> Iterable[str]:
    """The first figure at each step that was evaluated, if there are several."""
    curves = curves_of(evaluations, first_figure(rows))
    if curves is None:
        return
    yield "## Over training"
    yield f"Each seed's {curves.figure}, guidance {curves.guidance:g}, at the checkpoint of each step."
    lines = [["model", *(f"step {step:,}" for step in curves.steps)]]
    for (variant, point), group in groups(rows, recipe).items():
        curves_of_group = [curves.values.get(row["task"], {}) for row in group]
        cells = [_of_images([curve[step] for curve in curves_of_group if step in curve]) for step in curves.steps]
        lines.append([model_name(variant, point), *cells])
    yield markdown.table(lines)


def _of_images(values: list[float]) -> str:
    """All values, because an interval over two or three runs would be too wide to be useful."""
    return " / ".join(f"{value:.3g}" for value in values) or "-"


def _mean_lines(rows: Rows, recipe: Recipe) -> list[list]:
    lines: list[list[Any]] = [["model", "seeds", "parameters", "active", "training FLOPs", "loss", "training loss"]]
    lines[0] += ["load entropy", "dead experts", "images/s", "peak memory", "GPU-hours"]
    for (variant, point), group in groups(rows, recipe).items():
        first = group[0]
        sizes = [f"{first['parameters']:,}", f"{first['active_parameters']:,}", f"{first['training_flops']:.3g}"]
        losses = [mean_of(row[key] for row in group) for key in (LOSS, TRAINING_LOSS)]
        shares = [_average(group, "load_entropy", "{:.3f}".format), _average(group, "dead_share", "{:.1%}".format)]
        memory = _average(group, "memory_bytes", "{:,.0f} MiB".format, 2**20)
        cost = [_average(group, "images_per_second", significant), memory, _average(group, "gpu_hours", significant)]
        lines.append([model_name(variant, point), len(group), *sizes, *losses, *shares, *cost])
    return lines


def _average(group: list[dict], key: str, text: Callable[[float], str], unit: float = 1) -> str:
    values = [row[key] for row in group if row.get(key) is not None]
    return text(statistics.fmean(values) / unit) if values else "-"


def _exact(value: Any) -> Any:
    return f"{value:.7g}" if isinstance(value, float) else value
