"""Decides which models of a study stop early; the rule is in `early_stopping.py`."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from megapromoe.io import write_text
from megapromoe.number_text import significant
from megapromoe.run_lines import DENOISING_LOSS
from megapromoe.studies import markdown
from megapromoe.studies.collect import TAIL
from megapromoe.studies.early_stopping import StopEarly, decision_file
from megapromoe.studies.grid import Task
from megapromoe.studies.json_files import metrics
from megapromoe.studies.seed_statistics import mean_of
from megapromoe.studies.study import Study
from megapromoe.studies.tables import model_name

Arm = tuple[str, tuple]


def arm_of(task: Task) -> Arm:
    """The model of a task: its variant and its point, without the seed."""
    return task.variant, tuple(task.point.items())


def decide(study: Study) -> list[dict[str, Any]]:
    """Makes and writes the decisions that are possible now, in order; returns those of them that are new.

    A decision is possible when all runs of the models that are left have logged its step. Several commands may decide
    at once: they read the same lines, so they write the same file.
    """
    section, new = study.recipe.stop_early, []
    for step in section.steps if section is not None else ():
        if study.decision(step) is None:
            if waits_for(study, step):
                break
            new.append(_decide_at(study, step))
    return new


def waits_for(study: Study, step: int) -> list[Task]:
    """The runs that have not logged a step, of the models that no earlier decision has stopped."""
    tasks = (task for task in study.tasks if study.stopped_early(task) is None)
    return [task for task in tasks if not study.done(task) and study.steps_logged(task) < step]


def next_step(study: Study) -> int | None:
    """The first step of the section without a decision; None after the last."""
    section = study.recipe.stop_early
    return next((s for s in (section.steps if section else ()) if study.decision(s) is None), None)


def _decide_at(study: Study, step: int) -> dict[str, Any]:
    section = study.recipe.stop_early
    assert section is not None
    losses: dict[Arm, dict[int, float]] = {}
    for task in study.tasks:
        if study.stopped_early(task) is None:
            losses.setdefault(arm_of(task), {})[task.seed] = loss_at(study, task, step)
    stopped = stopped_arms(losses, section, study.recipe.baseline)
    means = {arm: statistics.fmean(seeds.values()) for arm, seeds in losses.items()}
    decision = {
        "step": step,
        "rule": {"keep": section.keep} if section.difference is None else {"difference": section.difference},
        "losses": {model_name(*arm): {str(seed): _finite(x) for seed, x in losses[arm].items()} for arm in losses},
        "best": model_name(*min(means, key=lambda arm: means[arm])),
        "stopped": [{"model": model_name(*arm), "variant": arm[0], "point": dict(arm[1])} for arm in stopped],
    }
    text = json.dumps(decision, indent=1, allow_nan=False) + "\n"
    write_text(decision_file(study.folder, step), text, parents=True, concurrent=True)
    return decision


def stopped_arms(losses: dict[Arm, dict[int, float]], section: StopEarly, baseline: str | None) -> list[Arm]:
    """The models that stop, in the order of `losses`, which has the same seeds for each.

    Args:
        losses: model -> seed -> loss; infinite if it is not a number.
        baseline: a variant that is never stopped.
    """
    means = {arm: statistics.fmean(seeds.values()) for arm, seeds in losses.items()}
    ranked = sorted(losses, key=lambda arm: means[arm])  # equal means stay in the order of the study
    if section.difference is None:
        worse = set(ranked[math.ceil(section.keep * len(ranked)) :])
    else:
        best = losses[ranked[0]]
        worse = {arm for arm in ranked[1:] if _is_worse(losses[arm], best, section.difference)}
    return [arm for arm in losses if arm in worse and arm[0] != baseline]


def _is_worse(losses: dict[int, float], best: dict[int, float], difference: float) -> bool:
    """Whether the interval of the paired differences to the best lies above `difference`."""
    if not all(map(math.isfinite, losses.values())):
        return True
    pairs = [losses[seed] - best[seed] for seed in losses if seed in best and math.isfinite(best[seed])]
    if len(pairs) < 2:
        return False
    mean = mean_of(pairs)
    return mean.mean - (mean.half or 0.0) > difference


def loss_at(study: Study, task: Task, step: int) -> float:
    """The denoising loss of a run up to a step: mean over its last tenth, else the last logged; infinite without."""
    lines = [line for line in metrics(study.run(task)) if line.get("step", 0) <= step]
    tail = [line for line in lines if line["step"] > (1 - TAIL) * step] or lines[-1:]
    values = [line.get(DENOISING_LOSS) for line in tail]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if values and len(known) == len(values) else math.inf


def decision_sections(study: Study) -> Iterable[str]:
    """Markdown: a table of the models that stopped early, with their loss at that step and that of the best."""
    section = study.recipe.stop_early
    decisions = [study.decision(step) for step in (section.steps if section else ())]
    lines = [["model", "stopped at step", "training loss at it", "best model at it", "training loss of the best"]]
    for decision in filter(None, decisions):
        for name in (stopped["model"] for stopped in decision["stopped"]):
            values = [_mean_in_words(decision["losses"][model]) for model in (name, decision["best"])]
            lines.append([name, f"{decision['step']:,}", values[0], decision["best"], values[1]])
    if len(lines) > 1:
        yield "## Stopped early"
        yield (
            "The section `stop_early` of the recipe ended these models before their last step. They are in no table of"
            " final results, and are not compared at later steps."
        )
        yield markdown.table(lines)


def decision_in_words(decision: dict[str, Any]) -> str:
    """A line for a new decision."""
    stopped = ", ".join(stopped["model"] for stopped in decision["stopped"]) or "none"
    return f"early stopping at step {decision['step']:,}: best {decision['best']}; stopped: {stopped}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean_in_words(losses: dict[str, float | None]) -> str:
    values: Sequence[float | None] = list(losses.values())
    known = [value for value in values if value is not None]
    return significant(statistics.fmean(known), 4) if known and len(known) == len(values) else "not finite"
