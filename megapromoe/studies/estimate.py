"""Estimates the cost of a study before it runs: parameters, operations, memory, hours."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megapromoe.config.data_options import UNSET
from megapromoe.planning.cost import memory_per_rank, parameters
from megapromoe.studies import markdown
from megapromoe.studies.evaluations import Evaluation
from megapromoe.studies.grid import Task
from megapromoe.studies.job_processes import command
from megapromoe.studies.json_files import metrics
from megapromoe.studies.recipe import StudyError, ranks_of
from megapromoe.studies.study import Study
from megapromoe.work_progress import size, track

MEASURED_STEPS = 20  # the first half is warm-up


@dataclass(frozen=True)
class Speed:
    """Useful operations per second of a task, over all its ranks, and the seconds of its start-up."""

    flops_per_second: float
    start: float = 0.0

    def seconds(self, task: Task) -> float:
        """Seconds that a task takes at this speed."""
        return self.start + task.flops / self.flops_per_second


def measure(study: Study) -> dict[str, Speed]:
    """Measures the speed of each variant by running a few steps of its most expensive task in a temporary folder.

    Raises StudyError with the last lines of the output if the training fails.
    """
    dearest: dict[str, Task] = {}
    for task in study.tasks:
        if task.variant not in dearest or task.flops > dearest[task.variant].flops:
            dearest[task.variant] = task
    speeds, half = {}, MEASURED_STEPS // 2
    short = [f"train.steps={MEASURED_STEPS}", "train.warmup=0", "train.save_every=0", f"train.log_every={half}"]
    for variant, task in track(dearest.items(), "model", "measuring"):
        with tempfile.TemporaryDirectory(prefix="megapromoe-measure-") as folder:
            words = command(study, task)
            if task.config.data.source == UNSET:
                words.append("data.source=synthetic")  # has the same speed
            words[words.index("--run-dir") + 1] = folder
            since = time.monotonic()
            done = subprocess.run([*words, *short], stdin=subprocess.DEVNULL, capture_output=True, text=True)
            seconds = time.monotonic() - since
            lines = metrics(Path(folder))
            if done.returncode or not lines:
                last_lines = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
                raise StudyError([f"{task.name}: could not be measured, exit code {done.returncode}: {last_lines}"])
            rate = lines[-1]["flops_per_second"]
            trained = task.flops / task.config.train.steps * MEASURED_STEPS / rate
            speeds[variant] = Speed(rate, max(0.0, seconds - trained))
    return speeds


def seconds(study: Study, speeds: Mapping[str, Speed]) -> float:
    """Seconds of all unfinished tasks and evaluations, one after another; sampling is assumed as fast as training."""
    trainings = sum(speeds[task.variant].seconds(task) for task in study.missing())
    drawing = ((job, speeds[job.task.variant]) for job in study.missing_evaluations())
    return trainings + sum(s.start + job.flops(len(job.steps)) / s.flops_per_second for job, s in drawing)


def evaluations_in_words(study: Study) -> str:
    """A sentence on the evaluations and their cost; empty for a study without evaluations."""
    evaluations = [job for job in study.jobs() if isinstance(job, Evaluation)]
    if not evaluations:
        return ""
    flops = sum(job.flops(len(job.steps)) for job in evaluations)
    checkpoints = sum(len(job.steps) for job in evaluations)
    images = sum(job.section.num * len(job.scales) * len(job.steps) for job in evaluations)
    return (
        f"evaluations: {len(evaluations)}, one after each training; {images:,} images of {checkpoints:,} checkpoints,"
        f" {flops:.3g} FLOPs of sampling; not done: {len(study.missing_evaluations())}"
    )


def table(study: Study) -> str:
    """A Markdown table of the tasks with their parameters, FLOPs and memory."""
    lines: list[list[object]] = [["task", "name", "parameters", "active", "training FLOPs", "states on a rank"]]
    for task in study.tasks:
        count, memory = (
            parameters(task.config.model),
            memory_per_rank(task.config, ranks_of(study.recipe, task.variant)),
        )
        held = memory.device + memory.host
        numbers = [f"{count.total:,}", f"{count.active:,}", f"{task.flops:.3g}", size(held)]
        lines.append([task.index, task.name, *numbers])
    return markdown.table(lines) + "\n"
