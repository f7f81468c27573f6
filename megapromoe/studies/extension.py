"""Adds tasks to a study: seeds, variants and values of axes, or evaluations of the tasks that it has.

The tasks that were planned before keep their configuration, folder and number, so that a job of a SLURM array that
still waits runs the task for which it was submitted. The number of a new task follows theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megapromoe.config.options import Config, to_dict
from megapromoe.config.resolve import to_yaml
from megapromoe.io import write_text
from megapromoe.studies.early_stopping import FOLDER as DECISIONS
from megapromoe.studies.grid import Task, expand
from megapromoe.studies.recipe import Recipe, StudyError, recipe_dict
from megapromoe.studies.study import Study, is_same, names, open_study, plan, study_text
from megapromoe.studies.task_locks import lock_path

CHECKPOINT_SETTINGS = ("train.snapshot_every", "train.save_every", "train.keep_every")  # which checkpoints are kept


@dataclass(frozen=True)
class Extension:
    """A study that was planned, and how that changed the study that was there before.

    Attributes:
        added: the new tasks; empty for a study that is new or as it was.
        changed: keys of the recipe that have other values, such as seeds.
    """

    study: Study
    added: tuple[Task, ...] = ()
    changed: tuple[str, ...] = ()


def plan_or_extend(folder: Path, recipe: Recipe) -> Extension:
    """Writes a new study, or adds what the recipe has in addition to the study of the folder. Raises StudyError."""
    folder = Path(folder)
    return extend(folder, recipe) if (folder / "study.yaml").exists() else Extension(plan(folder, recipe))


def extend(folder: Path, recipe: Recipe) -> Extension:
    """Adds the tasks of a recipe that the study of the folder does not have.

    `study.yaml` is replaced as a whole, after the configurations of the new tasks are written: if this process is
    killed, the folder holds the old study or the extended one.

    Raises StudyError, which names every difference, if the recipe would change or remove a planned task, and if
    another command is extending the study.
    """
    lock = lock_path(folder / "locks" / "study.lock")
    if lock is None:
        raise StudyError([f"{folder}: another command is changing this study; repeat the command when it has ended"])
    with lock:
        old = open_study(folder)
        if is_same(old.recipe, recipe):
            return Extension(old)
        before = old.recipe
        # Folder names of the study may contain former names of options.
        recipe = replace(recipe, former_axes=before.former_axes, task_order=tuple(task.name for task in old.tasks))
        tasks = expand(replace(recipe, task_order=()))
        if problems := _problems(old, recipe, tasks):
            raise StudyError([f"{folder / 'study.yaml'}: is another study; {problems[0]}", *problems[1:]])
        study = Study(folder, recipe, expand(recipe))
        added = study.tasks[len(old.tasks) :]
        for task in added:
            write_text(study.config(task), to_yaml(task.config), parents=True)
        write_text(folder / "study.yaml", study_text(recipe))  # from here on, the folder holds the extended study
    return Extension(study, added, _changed_keys(before, recipe))


def _problems(old: Study, recipe: Recipe, tasks: Sequence[Task]) -> list[str]:
    """Why these tasks do not extend the study: every planned task that would change or be missing."""
    new = {task.name: task for task in tasks}
    problems = []
    if missing := [task for task in old.tasks if task.name not in new]:
        problems.append(f"the recipe has no longer the tasks {names(missing)}")
    changes: dict[str, list[Task]] = {}  # a difference -> the tasks that have it
    for task in old.tasks:
        if task.name in new:
            for change in differences(task.config, new[task.name].config):
                changes.setdefault(change, []).append(task)
    problems += [f"{change} [{names(changed, 3)}]" for change, changed in changes.items()]
    kept = [task.name for task in tasks if task.name in {task.name for task in old.tasks}]
    planned = [task.name for task in expand(replace(old.recipe, task_order=()))]
    if not problems and kept != planned:
        problems.append("the planned tasks are in another order; put new seeds, values and variants behind the others")
    if old.recipe.stop_early != recipe.stop_early and (old.folder / DECISIONS).is_dir():
        problems.append(f"stop_early: differs, and models were stopped by the present section ({DECISIONS}/)")
    if not problems:
        return []
    remedy = "An extension adds seeds, variants, values of axes and evaluations"
    remedy += ", and keeps planned tasks as they are: undo these changes, or plan the recipe in another folder"
    if any(change.startswith(CHECKPOINT_SETTINGS) for change in changes) and recipe.evaluate != old.recipe.evaluate:
        remedy += "; evaluate.every needs checkpoints that planned tasks do not keep, the last one needs no `every`"
    return [*problems[:-1], f"{problems[-1]}. {remedy}"]


def differences(before: Config, after: Config) -> list[str]:
    """A text for each option in which two configurations differ, such as "train.lr: 0.004 -> 0.003"."""
    old, new = _flat(before), _flat(after)
    return [f"{key}: {_text(old[key])} -> {_text(new[key])}" for key in old if old[key] != new[key]]


def _flat(config: Config) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, part in to_dict(config).items() for key, value in part.items()}


def _text(value: Any) -> str:
    return json.dumps(value, default=str)


def _changed_keys(before: Recipe, after: Recipe) -> tuple[str, ...]:
    """Keys of a recipe with different values."""
    old, new = recipe_dict(before), recipe_dict(after)
    return tuple(key for key in {**old, **new} if old.get(key) != new.get(key))


def in_words(extension: Extension) -> Iterable[str]:
    """Lines on what was added to an existing study."""
    if not extension.changed:
        return
    kept = len(extension.study.tasks) - len(extension.added)
    yield f"extended: {kept} tasks as before, {len(extension.added)} new; changed in study.yaml: " + ", ".join(
        extension.changed
    )
    if extension.added:
        first, last = extension.added[0].index, extension.added[-1].index
        yield f"new tasks, {first} to {last}: {names(extension.added)}"
