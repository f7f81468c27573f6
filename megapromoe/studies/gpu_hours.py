"""Estimates the GPU-hours of a study on a kind of GPU, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megapromoe.planning.cost import flops_per_image, parameters
from megapromoe.planning.machines import MACHINES, Assumptions, Machine
from megapromoe.planning.search import PlanError, search
from megapromoe.studies import markdown
from megapromoe.studies.evaluations import evaluation_of
from megapromoe.studies.grid import Task
from megapromoe.studies.recipe import ranks_of
from megapromoe.studies.study import Study

# The layout of a study is that of its recipe; a plan chooses none.
FIXED = frozenset(
    f"{section}.{name}"
    for section, names in (
        ("parallel", ("tp", "ep", "expert_tp", "recompute", "shard_ranks")),
        ("train", ("deepspeed", "accumulation")),
    )
    for name in names
)
_FIRST = ("model", "parameters", "active", "GFLOPs", "runs", "training FLOPs")


@dataclass(frozen=True)
class Arm:
    """The tasks of one model at one point of the axes, which differ in the seed alone.

    Attributes:
        training, evaluation: estimated GPU-hours of all tasks; None if the model does not fit into the GPUs' memory.
        problem: why it does not fit.
    """

    tasks: tuple[Task, ...]
    training: float | None
    evaluation: float | None
    problem: str = ""

    @property
    def name(self) -> str:
        return self.tasks[0].name.rpartition("-seed")[0]


def arms(study: Study, machine: Machine) -> tuple[Arm, ...]:
    """The arms of a study, in the order of its tasks, with their estimated GPU-hours."""
    by_name: dict[str, list[Task]] = {}
    for task in study.tasks:
        by_name.setdefault(task.name.rpartition("-seed")[0], []).append(task)
    return tuple(_arm(study, tasks, machine) for tasks in by_name.values())


def _arm(study: Study, tasks: list[Task], machine: Machine) -> Arm:
    ranks, assume = ranks_of(study.recipe, tasks[0].variant), Assumptions()
    try:
        plan = search(tasks[0].config, ranks, machine, assume, FIXED).best
    except PlanError as error:
        return Arm(tuple(tasks), None, None, str(error))
    evaluations = [job for task in tasks if (job := evaluation_of(study.recipe, task)) is not None]
    sampling = sum(job.flops(len(job.steps)) for job in evaluations) / (machine.peak * plan.mfu) / 3600
    return Arm(tuple(tasks), plan.hours * ranks * len(tasks), sampling)


def arm_lines(study: Study, gpu: str) -> Iterator[str]:
    """A Markdown table of the arms of a study with their size and GPU-hours, its total, and what was assumed.

    Args:
        gpu: name of the kind of GPU, one of `MACHINES`.
    """
    machine, has_evaluations = MACHINES[gpu], study.recipe.evaluate is not None
    columns = [*_FIRST, "GPU-hours of training", *["of evaluation"] * has_evaluations]
    yield markdown.row(columns)
    yield markdown.row(["---"] * len(columns))
    rows = arms(study, machine)
    for arm in rows:
        model = arm.tasks[0].config.model
        count, flops = parameters(model), sum(task.flops for task in arm.tasks)
        cells = [arm.name, f"{count.total:,}", f"{count.active:,}", f"{flops_per_image(model).forward / 1e9:,.2f}"]
        cells += [str(len(arm.tasks)), f"{flops:.3g}", _hours(arm.training)]
        yield markdown.row([*cells, *[_hours(arm.evaluation)] * has_evaluations])
    yield ""
    problems = {arm.name: arm.problem for arm in rows if arm.problem}
    ranks = " or ".join(str(n) for n in sorted({ranks_of(study.recipe, arm.tasks[0].variant) for arm in rows}))
    if problems:
        yield f"GPU-hours: no total, since on {ranks} x {machine.name}"
        yield from (f"  {name}: {problem}" for name, problem in problems.items())
        return
    training, evaluation = (sum(getattr(arm, name) or 0.0 for arm in rows) for name in ("training", "evaluation"))
    parts = f", {training:,.0f} of training and {evaluation:,.0f} of evaluation" if has_evaluations else ""
    seeds = len(study.recipe.seeds)
    yield (
        f"GPU-hours: {training + evaluation:,.0f} in all on {machine.name}, {ranks} for each task{parts};"
        f" {(training + evaluation) / seeds:,.0f} for each of {seeds} seed{'s' * (seeds > 1)}"
    )
    yield (
        "an estimate, not a measurement: `megapromoe plan` prints its assumptions; without checkpoints and restarts."
        " GFLOPs: of one image forward, two operations for each multiply-add. Sampling is assumed as efficient as"
        " training"
    )


def _hours(hours: float | None) -> str:
    return "does not fit" if hours is None else f"{hours:,.1f}"
