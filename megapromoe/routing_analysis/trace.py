"""What a routing trace says about the load: statistics over the recorded steps, as numbers and as a table.

Letters: N recorded steps, M MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megapromoe.recorded_routes import Routes, changed_share
from megapromoe.routing_trace import fullest_over_mean, read_records

QUANTILES = {"p50": 0.5, "p95": 0.95, "max": 1.0}


@dataclass(frozen=True)
class LoadSeries:
    """The load in each recorded step; NaN where a layer, or a step, has no rows.

    Attributes:
        steps_N: the steps, ascending.
        blocks: the block of each layer.
        rows_NME: rows of each expert over all ranks, int64.
        expert_NM: rows of the fullest expert over the mean of the experts.
        rank_NM: rows that the fullest rank processes over the mean of all ranks, with the experts where they were.
        step_N: the sum over layers of the rows of the fullest rank, over the same sum of the means. If ranks wait for
            the fullest one in each layer and their time is that of their rows, routed experts take this many times as
            long as with even ranks.
        layouts: the (expert-parallel size, data-parallel ranks) that the records have, in their order.
    """

    steps_N: np.ndarray
    blocks: tuple[int, ...]
    rows_NME: np.ndarray
    expert_NM: np.ndarray
    rank_NM: np.ndarray
    step_N: np.ndarray
    layouts: tuple[tuple[int, int], ...]

    @property
    def relative_ME(self) -> np.ndarray:
        """Rows of each expert over the mean of its layer, over all steps; NaN for a layer without rows."""
        return relative_load(self.rows_NME.sum(0))


def relative_load(rows_E: np.ndarray) -> np.ndarray:
    """Rows over the mean of the last dimension, NaN where there are no rows."""
    mean = rows_E.mean(-1, keepdims=True)
    return np.divide(rows_E, mean, out=np.full(rows_E.shape, np.nan), where=mean > 0)


def load_series(path: Path, first: int = 0, last: int | None = None) -> LoadSeries:
    """Reads a trace, see `routing_trace.read_records`, and computes the load of its steps. Raises TraceError."""
    steps, rows, ranks, totals = [], [], [], []
    layouts: dict[tuple[int, int], None] = {}
    for record in read_records(path, first, last):
        rows_MP = np.moveaxis(record.rows_of_ranks(), 1, 0).reshape(len(record.blocks), -1)
        steps.append(record.step)
        rows.append(record.rows_ME)
        ranks.append(fullest_over_mean(rows_MP))
        mean = rows_MP.mean(-1).sum()
        totals.append(rows_MP.max(-1).sum() / mean if mean else np.nan)
        layouts[record.ep, len(record.rows_RME)] = None
    rows_NME = np.stack(rows)
    experts_NM = fullest_over_mean(rows_NME)
    return LoadSeries(
        np.array(steps), record.blocks, rows_NME, experts_NM, np.stack(ranks), np.array(totals), (*layouts,)
    )


def quantiles(value_N: np.ndarray) -> dict[str, np.ndarray]:
    """p50, p95 and max along the first dimension, over the values that are not NaN; NaN if all are."""
    some = ~np.isnan(value_N)
    filled = np.where(some, value_N, 0.0)
    results = {}
    for name, q in QUANTILES.items():
        columns = filled.reshape(len(value_N), -1).T
        kept = some.reshape(len(value_N), -1).T
        of_columns = [np.quantile(c[k], q) if k.any() else np.nan for c, k in zip(columns, kept, strict=True)]
        results[name] = np.array(of_columns).reshape(value_N.shape[1:])
    return results


def drift_of(routes: Sequence[Routes]) -> list[dict[str, Any]]:
    """The drift from each recording to the next: "from", "to" and "changed", the share of each layer."""
    return [{"from": a.step, "to": b.step, "changed": changed_share(a, b)} for a, b in pairwise(routes)]


def numbers_of(series: LoadSeries, routes: Sequence[Routes] = ()) -> dict[str, Any]:
    """All numbers, to be written as JSON by `report.plain`; lists are in the order of `blocks`."""
    numbers: dict[str, Any] = {
        "records": len(series.steps_N),
        "first_step": int(series.steps_N[0]),
        "last_step": int(series.steps_N[-1]),
        "blocks": series.blocks,
        "experts": series.rows_NME.shape[-1],
        "layouts": [{"ep": ep, "data_ranks": ranks} for ep, ranks in series.layouts],
        "records_without_rows": (series.rows_NME.sum(-1) == 0).sum(0),
        "fullest_expert_over_mean": quantiles(series.expert_NM),
        "fullest_rank_over_mean": quantiles(series.rank_NM),
        "fullest_rank_over_mean_of_the_step": {n: float(v) for n, v in quantiles(series.step_N).items()},
        "load_over_mean": series.relative_ME,
    }
    if routes:
        of = routes[0].of
        numbers["routes"] = {
            "steps": [recording.step for recording in routes],
            "weights": of.weights,
            "levels": of.levels,
        }
        numbers["routes"] |= {"images": len(of.images), "blocks": of.blocks, "tokens": int(np.prod(of.shape[1:]))}
        numbers["drift"] = drift_of(routes)
    return numbers


def tables_of(numbers: dict[str, Any]) -> list[list[list[str]]]:
    """The tables that the command prints, as cells with a header row: the load of each layer, then the drift."""
    of_experts, of_ranks = numbers["fullest_expert_over_mean"], numbers["fullest_rank_over_mean"]
    rows = [["fullest / mean", *(f"{what} {name}" for what in ("expert", "rank") for name in QUANTILES)]]
    for layer, block in enumerate(numbers["blocks"]):
        values = [of[name][layer] for of in (of_experts, of_ranks) for name in QUANTILES]
        rows.append([f"block {block}", *map(_cell, values)])
    of_step = numbers["fullest_rank_over_mean_of_the_step"]
    rows.append(["all blocks", *[""] * len(QUANTILES), *(_cell(of_step[name]) for name in QUANTILES)])
    if "drift" not in numbers:
        return [rows]
    drift = [["tokens that changed their expert", "mean of blocks", "most", "in block"]]
    for pair in numbers["drift"]:
        changed_L = pair["changed"]
        most = int(np.argmax(changed_L))
        name = f"step {pair['from']} to {pair['to']}"
        block = str(numbers["routes"]["blocks"][most])
        drift.append([name, f"{changed_L.mean():.1%}", f"{changed_L[most]:.1%}", block])
    return [rows, drift]


def _cell(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "no rows"
