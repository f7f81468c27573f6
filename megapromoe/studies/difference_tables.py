"""The rows of differences.csv: the paired difference of every model to each baseline, in every metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megapromoe.studies.collect import LOSS, TRAINING_LOSS
from megapromoe.studies.multiple_comparisons import adjusted
from megapromoe.studies.recipe import Recipe
from megapromoe.studies.seed_statistics import Rows, differences
from megapromoe.studies.tables import evaluated


def difference_rows(rows: Rows, recipe: Recipe, against: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each baseline, metric and model; `p_holm` is adjusted for all models of a baseline and metric.

    Args:
        rows: of results.csv.
        against: the baselines.
    """
    lines = []
    for baseline in against:
        for metric in (LOSS, TRAINING_LOSS, *evaluated(rows)):
            known = [row for row in rows if row.get(metric) is not None]
            means = {arm: m for arm, m in differences(known, recipe, baseline, metric).items() if arm[1] is not None}
            corrected = adjusted([mean.p for mean in means.values()])
            for ((variant, point), mean), p_holm in zip(means.items(), corrected, strict=True):
                line = {"against": baseline, "metric": metric, "variant": variant, **dict(point or ())}
                line |= {"seeds": mean.runs, "difference": mean.mean, "half_interval": mean.half}
                lines.append(line | {"p": mean.p, "p_holm": p_holm})
    return lines
