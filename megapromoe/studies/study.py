"""The folder of a study: its files, its jobs and their state.

==================  =================================================================================
study.yaml          the recipe
tasks.md            the tasks and their estimated cost
tasks/NAME.yaml     the full config of each task, as planned
runs/NAME/          the run directory of each task
logs/NAME.log       output of its training; NAME-evaluation.log: output of its evaluation
outcomes/NAME.json  how its last start ended; likewise NAME-evaluation.json
attempts/NAME.jsonl each start and its end, with the cause; likewise NAME-evaluation
locks/NAME.lock     locked while a command trains the task; its text names the process; likewise NAME-evaluation
decisions/          which models stop early, a file for each step at which they are compared
losses/NAME.json    the loss of its last checkpoint on fixed draws
results.csv, .md    results of `collect`, with noise, differences, evaluations, curves .csv
measurements.*      all measurements in long form, of `collect`, as CSV and Parquet
*.png, report.html  plots of `plot`, the page of `report`
==================  =================================================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.config.data_options import NO_DATA, UNSET
from megapromoe.config.options import Config, ConfigError
from megapromoe.config.presets import PRESETS
from megapromoe.config.resolve import resolve, to_yaml
from megapromoe.config.strict_yaml import read_yaml
from megapromoe.io import write_text
from megapromoe.studies.early_stopping import decision_file
from megapromoe.studies.evaluations import Evaluation, evaluation_of
from megapromoe.studies.grid import Task, expand
from megapromoe.studies.json_files import read_json
from megapromoe.studies.recipe import TASK_ORDER, Recipe, StudyError, ranks_of, read_recipe, recipe_dict

_COMPLETE = re.compile(r"step-(\d{8,})")  # folders with a suffix are being written
_PRESET_WARMUPS = {preset["train"]["warmup"] for preset in PRESETS.values() if "warmup" in preset.get("train", {})}
LAST_BYTES = 1 << 18  # bytes at the end of a metrics.jsonl that contain its last line

Job = Task | Evaluation  # what `run` runs in a separate process


@dataclass(frozen=True)
class Study:
    """A planned study. Made by `plan` or `open_study`."""

    folder: Path
    recipe: Recipe
    tasks: tuple[Task, ...]

    def run(self, task: Task) -> Path:
        """The run directory."""
        return self.folder / "runs" / task.name

    def config(self, task: Task) -> Path:
        return self.folder / "tasks" / f"{task.name}.yaml"

    def log(self, job: Job) -> Path:
        return self.folder / "logs" / f"{job.name}.log"

    def lock_file(self, job: Job) -> Path:
        return self.folder / "locks" / f"{job.name}.lock"

    def outcome_file(self, job: Job) -> Path:
        return self.folder / "outcomes" / f"{job.name}.json"

    def attempts_file(self, job: Job) -> Path:
        return self.folder / "attempts" / f"{job.name}.jsonl"

    def loss_file(self, task: Task) -> Path:
        return self.folder / "losses" / f"{task.name}.json"

    def outcome(self, job: Job) -> dict[str, Any] | None:
        """How the last start ended, with `code` and `said` (its error message); None before the first end."""
        return read_json(self.outcome_file(job))

    def jobs(self, tasks: Iterable[Task] | None = None) -> tuple[Job, ...]:
        """All jobs of the tasks (default: of all tasks): each training, followed by its evaluation."""
        jobs: list[Job] = []
        for task in self.tasks if tasks is None else tasks:
            evaluation = evaluation_of(self.recipe, task)
            jobs += [task] if evaluation is None else [task, evaluation]
        return tuple(jobs)

    def steps_saved(self, task: Task) -> int:
        """Number of steps of the newest complete checkpoint, 0 without one."""
        manifests = (self.run(task) / "checkpoints").glob("step-*/manifest.json")
        matches = (_COMPLETE.fullmatch(path.parent.name) for path in manifests)
        return max((int(match[1]) for match in matches if match), default=0)

    def last_line(self, job: Job) -> tuple[int, float | None]:
        """The last logged step of a training, and its time in seconds since 1970; None if nothing is logged.

        For an evaluation the step is 0, and the time is that of the last change of its log.
        """
        file = self.log(job) if isinstance(job, Evaluation) else self.run(job) / "metrics.jsonl"
        try:
            when = file.stat().st_mtime
        except OSError:
            return 0, None
        return 0 if isinstance(job, Evaluation) else self.steps_logged(job), when

    def steps_logged(self, task: Task) -> int:
        """The step of the last complete line of the metrics; 0 without one."""
        try:
            with open(self.run(task) / "metrics.jsonl", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return 0
        with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
            return json.loads(lines[-1])["step"]
        return 0

    def done(self, job: Job) -> bool:
        """Whether the last step of a training is saved, or whether an evaluation has the results of all its steps."""
        if isinstance(job, Evaluation):
            return not job.missing_steps(self.run(job.task))
        return self.steps_saved(job) >= job.config.train.steps

    def decision(self, step: int) -> dict[str, Any] | None:
        """The decision on models that stop early at a step; None before it is made."""
        return read_json(decision_file(self.folder, step))

    def stopped_early(self, task: Task) -> int | None:
        """The step at which the model of a task was stopped early; None if it was not."""
        section = self.recipe.stop_early
        for step in section.steps if section is not None else ():
            decision = self.decision(step)
            for stopped in decision["stopped"] if decision is not None else ():
                if (stopped["variant"], stopped["point"]) == (task.variant, task.point):
                    return step
        return None

    def ended(self, job: Job) -> bool:
        """Whether nothing is left to do: the job is done, or its model was stopped early."""
        task = job.task if isinstance(job, Evaluation) else job
        return self.done(job) or self.stopped_early(task) is not None

    def finished(self) -> list[Task]:
        """The tasks that belong into tables of final results: trained to the end, of models not stopped early."""
        return [task for task in self.tasks if self.done(task) and self.stopped_early(task) is None]

    def state(self, task: Task) -> str:
        """A short text: done, in training, or how the last start ended, with the progress."""
        if (step := self.stopped_early(task)) is not None:
            return f"stopped early, by the comparison at step {step:,}"
        if self.done(task):
            return "done"
        saved, outcome = self.steps_saved(task), self.outcome(task)
        if not (outcome or self.log(task).exists() or self.run(task).exists()):
            return "not started"
        progress = f"{saved or 'none'} of {task.config.train.steps} steps saved"
        logged = f"{self.steps_logged(task)} logged"
        if owner := RunDirectory(self.run(task)).owner():
            return f"in training ({owner}), {progress}, {logged}"
        if outcome is None:  # removed at a start, and written when the job has ended
            return f"killed together with the command that started it, or just started, {progress}, {logged}"
        return progress if outcome["code"] in (0, 75) else f"{failure(outcome['code'])}, {progress}"

    def missing(self) -> tuple[Task, ...]:
        """Tasks whose training is neither done nor stopped early."""
        return tuple(task for task in self.tasks if not self.ended(task))

    def missing_evaluations(self) -> tuple[Evaluation, ...]:
        return tuple(job for job in self.jobs() if isinstance(job, Evaluation) and not self.ended(job))

    def task(self, index: int) -> Task:
        """The task with this index. Raises StudyError."""
        if not 0 <= index < len(self.tasks):
            raise StudyError([f"task = {index}: {self.folder} has tasks 0..{len(self.tasks) - 1}"])
        return self.tasks[index]


def plan(folder: Path, recipe: Recipe) -> Study:
    """Writes the study. Does nothing if the folder already contains the same study.

    Raises StudyError if the recipe cannot be expanded, or if the folder holds another study or other things. A study
    that is to get more tasks: `extension.extend`.
    """
    tasks = expand(recipe)
    folder = Path(folder)
    file = folder / "study.yaml"
    if file.exists():
        if not is_same(read_recipe(file, saved=True), recipe):
            raise StudyError([f"{file}: is another study; choose another folder, or `run` the existing one"])
        return open_study(folder)
    ours = ("tasks", "study.yaml.")  # files left by a plan that was killed
    if folder.exists() and (not folder.is_dir() or any(not p.name.startswith(ours) for p in folder.iterdir())):
        raise StudyError([f"{folder}: is not empty and holds no study.yaml; choose another folder"])
    study = Study(folder, recipe, tasks)
    for task in tasks:
        write_text(study.config(task), to_yaml(task.config), parents=True)
    write_text(file, study_text(recipe), parents=True)  # written last: it marks a complete study
    return study


def missing_data(study: Study) -> str:
    """The error if the tasks of a study have no data source; else ""."""
    if all(task.config.data.source != UNSET for task in study.tasks):
        return ""
    return f"data.source = {UNSET!r}: {NO_DATA}; plan the study with it in another folder, or remove {study.folder}"


def is_same(first: Recipe, second: Recipe) -> bool:
    """Whether two recipes define the same study; the order of their entries is that of the tasks."""
    return yaml.safe_dump(recipe_dict(first), sort_keys=False) == yaml.safe_dump(recipe_dict(second), sort_keys=False)


def study_text(recipe: Recipe) -> str:
    """The content of study.yaml: the recipe, with what the names and numbers of existing tasks depend on."""
    content = recipe_dict(recipe)
    content["axes"] = {recipe.former_axes.get(key, key): values for key, values in content["axes"].items()}
    if recipe.task_order:
        content[TASK_ORDER] = list(recipe.task_order)
    return yaml.safe_dump(content, sort_keys=False)


def open_study(folder: Path) -> Study:
    """Reads the study of a folder. Raises StudyError if there is none, or if this version expands it differently."""
    folder = Path(folder)
    file = folder / "study.yaml"
    if not file.is_file():
        raise StudyError([f"{folder}: holds no study.yaml; make a study with `plan {folder} --recipe FILE`"])
    study = Study(folder, read_recipe(file, saved=True), ())
    problems, tasks = [], []
    for task in expand(study.recipe):
        try:
            planned = resolve(file=study.config(task), world=ranks_of(study.recipe, task.variant), file_is_saved=True)
        except ConfigError as error:
            problems.append(f"{study.config(task)}: {error.violations[0]}")
        else:
            if planned.train.warmup in _PRESET_WARMUPS:
                # An earlier version planned short trainings with the preset's full warm-up, which is kept.
                train = replace(task.config.train, warmup=planned.train.warmup)
                task = replace(task, config=replace(task.config, train=train))
            if planned != task.config:
                task = replace(task, config=_as_planned_before(task.config, study.config(task)))
            tasks.append(task)
            if planned != task.config:
                problems.append(
                    f"{study.config(task)}: differs from what this version derives from {file}; plan a new study"
                )
    if problems:
        raise StudyError(problems)
    return Study(folder, study.recipe, tuple(tasks))


def _as_planned_before(config: Config, file: Path) -> Config:
    """The config with a constant decay, if the study was planned by a version without `ema_warmup`."""
    named = "ema_warmup" in read_yaml(file).get("train", {})
    return config if named else replace(config, train=replace(config.train, ema_warmup=False))


def failure(code: int) -> str:
    """How a process ended, from its exit code; a negative code is the signal that killed it."""
    if code >= 0:
        return f"failed (exit code {code})"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def names(tasks: Iterable[Job], most: int = 5) -> str:
    """The names of jobs, for a sentence."""
    all_names = [task.name for task in tasks]
    more = f" and {len(all_names) - most} more" if len(all_names) > most else ""
    return ", ".join(all_names[:most]) + more
