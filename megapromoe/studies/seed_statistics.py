"""Statistics over the seeds of a study: means with intervals, paired differences, and trends over experts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student

from megapromoe.studies.collect import LOSS
from megapromoe.studies.fit import LEVEL
from megapromoe.studies.recipe import Recipe

Rows = Sequence[dict[str, Any]]
EXPERTS = "model.num_experts"


@dataclass(frozen=True)
class Mean:
    """Mean of independent runs; `half` is half of its 95 % interval by Student's t, None for a single run."""

    mean: float
    half: float | None
    runs: int

    def __format__(self, sign: str) -> str:
        return f"{self.mean:{sign}.4f}" + ("" if self.half is None else f" ± {self.half:.4f}")

    def __str__(self) -> str:
        return f"{self:}"

    @property
    def differs(self) -> bool:
        """Does the interval leave out 0?"""
        return self.half is not None and abs(self.mean) > self.half

    @property
    def p(self) -> float | None:
        """The p-value of the two-sided t-test of a mean of 0, below 0.05 where it `differs`; None for a single run."""
        if self.half is None:
            return None
        if self.half == 0:
            return float(self.mean == 0)
        freedom = self.runs - 1
        errors = abs(self.mean) / self.half * student.ppf((1 + LEVEL) / 2, freedom)
        return float(2 * student.sf(errors, freedom))


def mean_of(values: Iterable[float]) -> Mean:
    """The mean with its 95 % interval."""
    values = list(values)
    if len(values) < 2:
        return Mean(values[0], None, 1)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Mean(statistics.fmean(values), float(student.ppf((1 + LEVEL) / 2, len(values) - 1)) * error, len(values))


def groups(rows: Rows, recipe: Recipe) -> dict[tuple[str, tuple], list[dict]]:
    """Rows that differ in the seed alone: (variant, ((axis, value), ...)) -> rows, in the order of the study."""
    grouped: dict[tuple[str, tuple], list[dict]] = {}
    for variant in recipe.variants:
        for row in rows:
            if row["variant"] == variant.name:
                point = tuple((axis, row[axis]) for axis in recipe.axes if axis in row)
                grouped.setdefault((variant.name, point), []).append(row)
    order = {axis: recipe.axes[axis].index for axis in recipe.axes}
    names = [variant.name for variant in recipe.variants]
    return dict(sorted(grouped.items(), key=lambda g: (names.index(g[0][0]), [order[a](v) for a, v in g[0][1]])))


def differences(rows: Rows, recipe: Recipe, against: str, key: str = LOSS) -> dict[tuple[str, tuple | None], Mean]:
    """The mean over seeds of each of `paired_differences`, with its interval."""
    return {place: mean_of(seeds.values()) for place, seeds in paired_differences(rows, recipe, against, key).items()}


def paired_differences(
    rows: Rows, recipe: Recipe, against: str, key: str = LOSS
) -> dict[tuple[str, tuple | None], dict[int, float]]:
    """Differences of each group to the runs of `against` at the same point and seed, which have the same stream.

    Each seed gives one number: the mean if `against` has several matching points. For variants with several points the
    key (variant, None) has the mean over all points, of the seeds that have all of them. Groups without a matching run
    are left out.
    """
    partners = [row for row in rows if row["variant"] == against]
    by_seed: dict[tuple[str, tuple | None], dict[int, list[float]]] = {}
    for (variant, point), group in groups(rows, recipe).items():
        for row in group if variant != against else ():
            same = [o for o in partners if o["seed"] == row["seed"] and all(o.get(a, v) == v for a, v in point)]
            if same:
                difference = row[key] - statistics.fmean(other[key] for other in same)
                for place in (point, None):
                    by_seed.setdefault((variant, place), {}).setdefault(row["seed"], []).append(difference)
    pairs = {}
    for (variant, place), seeds in by_seed.items():
        points = max(map(len, seeds.values()))
        if place is not None or points > 1:
            complete = {seed: statistics.fmean(values) for seed, values in seeds.items() if len(values) == points}
            pairs[variant, place] = complete
    names = [variant.name for variant in recipe.variants]
    return dict(sorted(pairs.items(), key=lambda item: (names.index(item[0][0]), item[0][1] is None)))


def trends(rows: Rows, recipe: Recipe, key: str = LOSS) -> dict[tuple[str, tuple], Mean]:
    """Change of the loss per doubling of the experts: slope of a line over log2 E for each seed, and mean over seeds.

    Keys are (variant, the other axes). Fitting each seed separately removes effects common to a seed, such as an easier
    stream. Seeds without one of the numbers of experts are left out.
    """
    lines: dict[tuple[str, tuple], dict[int, dict[float, float]]] = {}
    for (variant, point), group in groups(rows, recipe).items():
        rest = tuple((axis, value) for axis, value in point if axis != EXPERTS)
        for row in group if len(rest) < len(point) else ():
            seeds = lines.setdefault((variant, rest), {})
            seeds.setdefault(row["seed"], {})[math.log2(row["experts"])] = row[key]
    slopes = {}
    for name, seeds in lines.items():
        most = max(map(len, seeds.values()))
        complete = [line for line in seeds.values() if len(line) == most]
        if most > 1:
            slopes[name] = mean_of(statistics.linear_regression(list(x), list(x.values())).slope for x in complete)
    return slopes
