"""The processes of a job: how many ranks it has, what starts them, and on how many nodes.

A recipe gives them for all tasks; a variant overrides them, such as `ranks: 16` for a larger model, and so does the
section `evaluate` for the evaluations. Every layout trains the same function, so the results of tasks with different
numbers of ranks are comparable.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from megapromoe.config.options import ConfigError
from megapromoe.config.resolve import resolve
from megapromoe.studies.evaluations import Evaluation
from megapromoe.studies.grid import Task
from megapromoe.studies.recipe import Recipe, StudyError, launcher_of, ranks_of, variant_of
from megapromoe.studies.study import Job, Study

# Launchers that start one process for each task of a SLURM job, on all its nodes; others start theirs on one node.
STARTS_TASKS = ("srun", "mpirun", "mpiexec")


@dataclass(frozen=True)
class Placement:
    """The processes of a job.

    Attributes:
        launcher: command that starts them, before `-m megapromoe`; empty for a single process.
        nodes: nodes of a SLURM job; 0: as few as its GPUs need.
        gpus_per_node: GPUs of a node; 0: not given.
    """

    ranks: int
    launcher: tuple[str, ...]
    nodes: int = 0
    gpus_per_node: int = 0

    @property
    def is_local(self) -> bool:
        """Whether all processes run on this machine, as far as the launcher shows."""
        return not self.launcher or Path(self.launcher[0]).name not in STARTS_TASKS


def placement_of(recipe: Recipe, job: Job) -> Placement:
    """The placement of a training or an evaluation."""
    task = job.task if isinstance(job, Evaluation) else job
    variant = variant_of(recipe, task.variant)
    ranks = ranks_of(recipe, variant.name)
    launcher = variant.launcher or recipe.launcher
    nodes, gpus = variant.nodes or recipe.nodes, variant.gpus_per_node or recipe.gpus_per_node
    if isinstance(job, Evaluation) and (job.section.ranks or job.section.launcher):
        if job.section.ranks and job.section.ranks != ranks:
            nodes = 0  # that of the training does not fit
        ranks = job.section.ranks or ranks
        launcher = job.section.launcher or (() if ranks == 1 and job.section.ranks else launcher)
    return Placement(ranks, launcher_of(launcher, ranks), nodes, gpus)


def on_this_machine(study: Study, ranks: int) -> Study:
    """The study with `ranks` processes for each job, which torchrun starts on this machine.

    The recipe in the folder stays as it is. Raises StudyError if a task cannot be divided over this number of ranks.
    """
    problems: dict[str, list[Task]] = {}
    for task in study.tasks:
        try:
            resolve(file=study.config(task), world=ranks, file_is_saved=True)
        except ConfigError as error:
            for line in error.violations:
                problems.setdefault(line, []).append(task)
    if problems:
        raise StudyError(f"--ranks {ranks}: {line} [{tasks[0].name}]" for line, tasks in problems.items())
    launcher = () if ranks == 1 else standalone(ranks)
    variants = tuple(
        replace(variant, ranks=0, launcher=(), nodes=0, gpus_per_node=0) for variant in study.recipe.variants
    )
    evaluate = study.recipe.evaluate
    if evaluate is not None:
        evaluate = replace(evaluate, ranks=0, launcher=())
    recipe = replace(study.recipe, ranks=ranks, launcher=launcher, nodes=0, variants=variants, evaluate=evaluate)
    return replace(study, recipe=recipe)


def standalone(ranks: int) -> tuple[str, ...]:
    """torchrun on this machine, with a free port, so that several jobs can run at the same time."""
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
