"""How many seeds resolve a difference between two models: power of the t-test, from a study's own noise.

With N seeds of both models, the mean difference over its standard error follows the noncentral t distribution,

    paired:    N - 1 degrees of freedom,   noncentrality d / s_pair · sqrt(N),
    unpaired:  2N - 2 degrees of freedom,  noncentrality d / s_single · sqrt(N / 2),

for a true difference d. The power is the probability that the 95 % interval excludes zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache

from scipy.optimize import brentq
from scipy.stats import nct
from scipy.stats import t as student

from megapromoe.number_text import significant
from megapromoe.studies import markdown
from megapromoe.studies.fit import LEVEL
from megapromoe.studies.noise import Deviation, NoiseFloor, metric_name
from megapromoe.studies.recipe import StudyError

POWER = 0.8
SEEDS = range(2, 21)  # rows of the table
MOST = 100_000  # seeds; more are not counted


def power_of(effect: float, seeds: int, paired: bool) -> float:
    """The probability that the interval of a difference excludes zero, two-sided.

    Args:
        effect: the true difference in standard deviations: of paired differences, or of single runs.
        seeds: of each of the two models, at least two.
    """
    freedom = seeds - 1 if paired else 2 * seeds - 2
    shift = abs(effect) * math.sqrt(seeds if paired else seeds / 2)
    limit = student.ppf((1 + LEVEL) / 2, freedom)
    wrong_sign = nct.cdf(-limit, freedom, shift) if shift < 5 else 0.0  # below 3e-7, where scipy's value is nan
    return float(nct.sf(limit, freedom, shift) + wrong_sign)


@cache
def resolved_effect(seeds: int, paired: bool, power: float = POWER) -> float:
    """The smallest effect, in standard deviations, that this number of seeds resolves with this power."""
    high = 1.0
    while power_of(high, seeds, paired) < power:
        high *= 2
    return float(brentq(lambda effect: power_of(effect, seeds, paired) - power, 0.0, high, xtol=1e-9))


def seeds_for(effect: float, paired: bool, power: float = POWER) -> int | None:
    """The smallest number of seeds that resolves an effect; None if it is above `MOST`."""
    low, high = 1, 2
    while power_of(effect, high, paired) < power:
        if high >= MOST:
            return None
        low, high = high, min(2 * high, MOST)
    while high - low > 1:  # power rises with the seeds
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(effect, middle, paired) >= power else (middle, high)
    return high


def find_floor(floors: Sequence[NoiseFloor], metric: str) -> NoiseFloor:
    """The noise of a metric, named by its column or by a part of it that no other metric has. Raises StudyError."""
    exact = [floor for floor in floors if metric in (floor.metric, metric_name(floor.metric))]
    matching = exact or [floor for floor in floors if metric.lower() in floor.metric.lower()]
    if len(matching) == 1:
        return matching[0]
    rule = f"is a part of {len(matching)} of them" if matching else "is none of them"
    names = "; ".join(floor.metric for floor in floors)
    raise StudyError([f"--metric {metric!r}: {rule}; the metrics with two seeds are: {names}"])


def power_sections(floor: NoiseFloor, difference: float | None = None, power: float = POWER) -> Iterable[str]:
    """The report of `study power`: the noise, the seeds for `difference` if it is given, and the table over seeds."""
    kinds = [(floor.pair, True), (floor.single, False)]
    name = metric_name(floor.metric)
    yield f"# Power: {name}"
    pair = "unknown: no two models have two seeds in common" if floor.pair is None else _spread(floor.pair)
    yield (
        f"Standard deviation over seeds, from {floor.runs} runs of {floor.arms} models: of a single run"
        f" {_spread(floor.single)}; of a paired difference {pair}."
    )
    if difference is not None:
        counts = [_seeds_in_words(deviation, paired, difference, power) for deviation, paired in kinds if deviation]
        yield f"A difference of {difference:g} is resolved by {' and by '.join(counts)}."
    yield (
        f"N seeds of each of two models resolve a difference of d: if the true difference is d, the 95 % interval"
        f" excludes zero in {power:.0%} of studies. In brackets: with the ends of the 95 % interval of the noise."
    )
    lines = [["seeds", "d, paired", "d, unpaired"]]
    for seeds in SEEDS:
        effects = [(deviation, resolved_effect(seeds, paired, power)) for deviation, paired in kinds]
        cells = ["-" if deviation is None else _spread(deviation.times(effect)) for deviation, effect in effects]
        lines.append([str(seeds), *cells])
    yield markdown.table(lines)
    yield "The table is for one comparison. With several, an adjusted interval needs more seeds: docs/study.md."


def _seeds_in_words(deviation: Deviation, paired: bool, difference: float, power: float) -> str:
    low, high = deviation.interval
    counts = [
        2 if value == 0 else (None if math.isinf(value) else seeds_for(difference / value, paired, power))
        for value in (deviation.value, low, high)
    ]
    estimate, least, most = (f"more than {MOST:,}" if count is None else f"{count:,}" for count in counts)
    return f"{estimate} {'pairs' if paired else 'unpaired seeds of each model'} ({least} to {most})"


def _spread(deviation: Deviation) -> str:
    low, high = (significant(end, 2) for end in deviation.interval)
    return f"{significant(deviation.value, 2)} ({low} to {high})"
