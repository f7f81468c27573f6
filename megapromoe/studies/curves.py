"""Results of `megapromoe evaluate` over the trainings of a study: each metric at each evaluated step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megapromoe.run_lines import lines_of
from megapromoe.studies.evaluations import RECORDS, evaluation_of
from megapromoe.studies.grid import Task
from megapromoe.studies.study import Study


@dataclass(frozen=True)
class Curves:
    """One metric at one number of images and one guidance scale, over the training of each run.

    Attributes:
        figure: name of the metric, with the number of images.
        values: task -> step -> value, steps ascending; without tasks that are not evaluated.
    """

    figure: str
    guidance: float
    values: dict[str, dict[int, float]]

    @property
    def steps(self) -> list[int]:
        """All steps at which any run is evaluated, ascending."""
        return sorted({step for curve in self.values.values() for step in curve})

    def mean(self, tasks: Sequence[str]) -> dict[int, float]:
        """Step -> mean over the tasks, for steps that all of them have, so that each mean is over the same seeds."""
        curves = [self.values.get(task, {}) for task in tasks]
        steps = sorted(set.intersection(*map(set, curves)))
        return {step: sum(curve[step] for curve in curves) / len(curves) for step in steps}


def figures(study: Study, task: Task) -> list[dict[str, Any]]:
    """Evaluation results of a task: a row for each metric, step, guidance scale and number of images.

    If several records have the same key, the newest is used, but records that match the recipe take precedence over
    others, such as manual evaluations of other weights.
    """
    values, records = {}, lines_of(study.run(task) / RECORDS)
    if (evaluation := evaluation_of(study.recipe, task)) is not None:
        records.sort(key=evaluation.is_of)  # stable sort: other records first, matching ones last; each oldest first
    for record in records:
        for name, value in record["figures"].items():
            values[record["step"], record["guidance"], record["count"], name] = value
    identity = {"task": task.name, "variant": task.variant, "seed": task.seed, **task.point}
    names = ("step", "guidance", "count", "figure", "value")
    return [{**identity, **dict(zip(names, (*key, value), strict=True))} for key, value in values.items()]


def titled(row: dict[str, Any]) -> str:
    """Name of the metric of a row, which includes the network, with the number of images."""
    return f"{row['figure']}, {row['count']:,} images"


def several_steps(rows: Iterable[dict[str, Any]]) -> bool:
    """Whether any task is evaluated at more than one step."""
    steps: dict[str, set[int]] = {}
    for row in rows:
        steps.setdefault(row["task"], set()).add(row["step"])
    return any(len(task_steps) > 1 for task_steps in steps.values())


def curves_of(rows: Iterable[dict[str, Any]], figure: str | None) -> Curves | None:
    """The curves of the metric named `figure` (see `titled`); None if no run is evaluated at two steps.

    Of the guidance scales that is taken at which some run was evaluated at most steps; of equals the highest.
    """
    if figure is None:
        return None
    scales: dict[float, dict[str, dict[int, float]]] = {}
    for row in sorted((row for row in rows if titled(row) == figure), key=lambda row: row["step"]):
        scales.setdefault(row["guidance"], {}).setdefault(row["task"], {})[row["step"]] = row["value"]
    if not scales:
        return None
    most = {guidance: max(map(len, values.values())) for guidance, values in scales.items()}
    guidance = max(scales, key=lambda scale: (most[scale], scale))
    return Curves(figure, guidance, scales[guidance]) if most[guidance] > 1 else None
