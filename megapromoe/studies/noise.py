"""The noise floor of a study: how much results differ with the seed alone, of single runs and of pairs.

Runs of one seed see the same stream, so they share a part of their deviation. The model is that of a two-way analysis
of variance without replication,

    value(arm, seed) = mean(arm) + shift(seed) + rest(arm, seed),

where an arm is a model at one point of the axes. A *single run* deviates by shift + rest; the difference of a *pair*,
two arms of one seed, by the difference of two rests, because the shift cancels.

* The variance of a single run is pooled over the arms. Arms share the shifts, so their variances are not independent:
  the pooled variance is a sum of two mean squares, of the shifts and of the rest. Its effective degrees of freedom are
  those of Satterthwaite (1946), and its interval that of Graybill and Wang (1980), which combines the chi-square
  intervals of the two. (Satterthwaite's own interval holds in 88 instead of 95 % for six arms and four seeds.)
* The variance of a paired difference is pooled over all pairs of arms. It is twice the mean square of the rest: for a
  complete grid, exactly the mean over all pairs of the variance of their differences.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from scipy.stats import chi2
from scipy.stats import t as student

from megapromoe.number_text import significant
from megapromoe.studies import markdown
from megapromoe.studies.collect import EVALUATED, LOSS, TRAINING_LOSS
from megapromoe.studies.fit import LEVEL
from megapromoe.studies.recipe import Recipe
from megapromoe.studies.seed_statistics import Rows, groups
from megapromoe.studies.tables import evaluated, first_figure

Arm = TypeVar("Arm", bound=Hashable)

TITLE = "## Noise floor"
_NAMES = {LOSS: "loss", TRAINING_LOSS: "training loss"}


@dataclass(frozen=True)
class Deviation:
    """A standard deviation: the root of a sum of mean squares.

    Attributes:
        value: the estimate.
        freedom: its (effective) degrees of freedom.
        interval: its 95 % interval, from the chi-square distributions of the mean squares.
    """

    value: float
    freedom: float
    interval: tuple[float, float]

    @property
    def limit(self) -> float:
        """What a new value deviates from 0 by more than in 5 % of cases, by Student's t: the estimate is uncertain."""
        return float(student.ppf((1 + LEVEL) / 2, self.freedom)) * self.value

    def times(self, factor: float) -> Deviation:
        """The deviation of a multiple of the quantity."""
        low, high = self.interval
        return Deviation(factor * self.value, self.freedom, (factor * low, factor * high))


def deviation_of(squares: Iterable[tuple[float, int]], divisor: float) -> Deviation:
    """The root of the sum of independent sums of squares, over a divisor.

    Args:
        squares: pairs of a sum of squares and its degrees of freedom, which are positive.
    """
    parts = [(total / divisor, freedom) for total, freedom in squares]
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / freedom for part, freedom in parts)
    effective = variance**2 / spread if spread > 0 else float(sum(freedom for _, freedom in parts))
    # By how much, relative to it, the ends of each part's own interval are off the part.
    ends = [(part, *(freedom / chi2.ppf(_TAILS, freedom) - 1)) for part, freedom in parts]
    below = math.sqrt(sum((part * low) ** 2 for part, low, _ in ends))
    above = math.sqrt(sum((part * high) ** 2 for part, _, high in ends))
    interval = math.sqrt(max(variance - below, 0.0)), math.sqrt(variance + above)
    return Deviation(math.sqrt(variance), effective, interval)


_TAILS = np.array([(1 + LEVEL) / 2, (1 - LEVEL) / 2])


@dataclass(frozen=True)
class NoiseFloor:
    """The noise of one metric.

    Attributes:
        metric: its column in results.csv.
        single: of a single run.
        pair: of the difference of two arms on one seed; None if no two arms have two seeds in common.
    """

    metric: str
    arms: int
    runs: int
    single: Deviation
    pair: Deviation | None

    @property
    def unpaired(self) -> Deviation:
        """Of the difference of two single runs of different seeds."""
        return self.single.times(math.sqrt(2))

    @property
    def ratio(self) -> float | None:
        """Deviation of a paired difference over that of an unpaired one; None if one of them is unknown."""
        return self.pair.value / self.unpaired.value if self.pair is not None and self.single.value > 0 else None


def noise_floor(metric: str, values: Mapping[Arm, Mapping[int, float]]) -> NoiseFloor | None:
    """The noise of a metric from its values, arm -> seed -> value; None if no arm has two seeds."""
    values = {arm: seeds for arm, seeds in values.items() if len(seeds) > 1}
    if not values:
        return None
    value_R = np.array([value for seeds in values.values() for value in seeds.values()], dtype=float)
    arm_R = np.repeat(np.arange(len(values)), [len(seeds) for seeds in values.values()])
    numbers = {seed: i for i, seed in enumerate(sorted({seed for seeds in values.values() for seed in seeds}))}
    seed_R = np.array([numbers[seed] for seeds in values.values() for seed in seeds])
    runs, arms = len(value_R), len(values)

    deviation_R = value_R - (np.bincount(arm_R, value_R) / np.bincount(arm_R))[arm_R]
    within, freedom = float((deviation_R**2).sum()), runs - arms
    design = np.concatenate([np.eye(arms)[arm_R], np.eye(len(numbers))[seed_R]], axis=1)
    solution, _, rank, _ = np.linalg.lstsq(design, deviation_R, rcond=None)
    rest, rest_freedom = float(((deviation_R - design @ solution) ** 2).sum()), runs - int(rank)
    shift, shift_freedom = max(within - rest, 0.0), freedom - rest_freedom

    single = deviation_of(((s, df) for s, df in ((shift, shift_freedom), (rest, rest_freedom)) if df), freedom)
    pair = deviation_of([(rest, rest_freedom)], rest_freedom).times(math.sqrt(2)) if rest_freedom else None
    return NoiseFloor(metric, arms, runs, single, pair)


def noise_floors(rows: Rows, recipe: Recipe) -> list[NoiseFloor]:
    """The noise of each metric of a study's rows that has one: the losses, and the metrics of sampled images."""
    floors = []
    for metric in (LOSS, TRAINING_LOSS, *evaluated(rows)):
        floor = noise_floor(metric, values_of(rows, recipe, metric))
        floors += [] if floor is None else [floor]
    return floors


def values_of(rows: Rows, recipe: Recipe, metric: str) -> dict[tuple[str, tuple], dict[int, float]]:
    """Arm -> seed -> value of a metric, for the runs that have it."""
    return {
        arm: {row["seed"]: row[metric] for row in group if row.get(metric) is not None}
        for arm, group in groups(rows, recipe).items()
    }


def metric_name(metric: str) -> str:
    """The name of a metric in tables and plots."""
    return _NAMES.get(metric, metric.removeprefix(EVALUATED))


def noise_rows(floors: Iterable[NoiseFloor]) -> list[dict[str, Any]]:
    """A row of noise.csv for each metric. Deviations are standard deviations; limits are exceeded in 5 % of cases."""
    rows = []
    for floor in floors:
        row: dict[str, Any] = {"metric": floor.metric, "arms": floor.arms, "runs": floor.runs}
        for name, deviation in (("single_run", floor.single), ("paired_difference", floor.pair)):
            low, high = deviation.interval if deviation is not None else (None, None)
            row |= {name: deviation and deviation.value, f"{name}_low": low, f"{name}_high": high}
            row |= {f"{name}_freedom": deviation and deviation.freedom}
        row |= {"unpaired_difference": floor.unpaired.value, "ratio": floor.ratio}
        row |= {"unpaired_limit": floor.unpaired.limit, "paired_limit": floor.pair and floor.pair.limit}
        rows.append(row)
    return rows


def noise_sections(rows: Rows, recipe: Recipe) -> Iterable[str]:
    """The section of results.md, with a sentence on the loss and on the first metric of images."""
    floors = noise_floors(rows, recipe)
    if not floors:
        return
    yield TITLE
    yield (
        "Standard deviations over seeds, each with its 95 % interval. A single run: pooled over the models. A paired"
        " difference: of two models on one seed, which have the same stream, pooled over the pairs of models. Ratio: of"
        " a paired difference to an unpaired one, that of two single runs; below 1, pairing helps."
    )
    lines = [["metric", "single run", "unpaired difference", "paired difference", "ratio"]]
    lines[0] += ["5 % limit", "5 % limit, paired"]
    for floor in floors:
        ratio = "-" if floor.ratio is None else f"{floor.ratio:.2f}"
        cells = [metric_name(floor.metric), _in_words(floor.single), _in_words(floor.unpaired), _in_words(floor.pair)]
        limits = [deviation and significant(deviation.limit, 2) for deviation in (floor.unpaired, floor.pair)]
        lines.append([*cells, ratio, *(limit or "-" for limit in limits)])
    yield markdown.table(lines)
    first = first_figure(rows)
    quoted = [
        floor for floor in floors if floor.metric == LOSS or (first and metric_name(floor.metric).startswith(first))
    ]
    for floor in quoted[:2]:
        yield sentence(floor)


def sentence(floor: NoiseFloor) -> str:
    """What chance alone does to a metric."""
    text = (
        f"By chance alone, two single runs differ in {metric_name(floor.metric)} by more than"
        f" {significant(floor.unpaired.limit, 2)} in 5 % of cases"
    )
    if floor.pair is None:
        return f"{text}. Pairs have no known noise: that needs two models with two common seeds."
    return f"{text}; pairs on one seed differ by more than {significant(floor.pair.limit, 2)}."


def _in_words(deviation: Deviation | None) -> str:
    if deviation is None:
        return "-"
    low, high = (significant(end, 2) for end in deviation.interval)
    return f"{significant(deviation.value, 2)} ({low} to {high})"
