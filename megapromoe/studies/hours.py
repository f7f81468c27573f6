"""GPU-hours of a study: of finished runs from their clocks, of the others estimated from the speed of those."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megapromoe.number_text import significant
from megapromoe.run_lines import elapsed_seconds
from megapromoe.studies import markdown
from megapromoe.studies.grid import Task
from megapromoe.studies.recipe import ranks_of
from megapromoe.studies.study import Study


def hours_of(lines: Sequence[Mapping[str, Any]], task: Task, ranks: int) -> float | None:
    """Hours of training over all starts, times the ranks; None if the lines have neither a clock nor a speed.

    Start-up and evaluations are not included. On a GPU each rank has one; on a CPU it is a process.

    Args:
        lines: of metrics.jsonl.
    """
    times = elapsed_seconds(lines, task.config.train.global_batch)
    return times[-1] / 3600 * ranks if times and times[-1] > 0 else None


def estimated_hours(study: Study, task: Task, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """GPU-hours of the steps of a task that are not saved, at the median speed of finished runs.

    The speed is that of the runs of the same variant, else of all; None without any.
    """
    speeds = [(row["variant"], row["flops_per_second"]) for row in rows if row.get("flops_per_second")]
    same = [speed for variant, speed in speeds if variant == task.variant] or [speed for _, speed in speeds]
    if not same:
        return None
    left = 1 - min(1.0, study.steps_saved(task) / task.config.train.steps)
    return left * task.flops / statistics.median(same) / 3600 * ranks_of(study.recipe, task.variant)


def hours_sections(study: Study, rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """A table of the tasks that are neither done nor stopped early, with the estimated GPU-hours of what is left."""
    missing = study.missing()
    if not missing or not rows:
        return
    yield "## Not trained yet"
    spent = [row["gpu_hours"] for row in rows if row.get("gpu_hours") is not None]
    hours = {task.name: estimated_hours(study, task, rows) for task in missing}
    known = [value for value in hours.values() if value is not None]
    yield (
        f"The runs above took {significant(sum(spent))} GPU-hours (hours of training, times ranks). Left, at their"
        f" speed: {significant(sum(known))}."
    )
    lines = [["task", "steps saved", "GPU-hours left, estimated"]]
    for task in missing:
        value = hours[task.name]
        saved = f"{study.steps_saved(task):,} of {task.config.train.steps:,}"
        lines.append([task.name, saved, "-" if value is None else significant(value)])
    yield markdown.table(lines)
