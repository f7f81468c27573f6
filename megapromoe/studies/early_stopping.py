"""The section `stop_early` of a recipe: models that are clearly worse are not trained to the end.

    stop_early:
      steps: [250, 500]     # training steps at which models are compared
      keep: 0.5             # the better half goes on (successive halving)
      difference: 0.002     # instead of keep: a model stops if it is worse than the best by more than this

At each of these steps all seeds of all models that are left are compared by their training loss: the denoising loss,
mean over the last tenth of the steps up to there. With `keep`, the models with the smallest mean over seeds go on, this
share of them, rounded up. With `difference`, a model stops if the 95 % interval of its paired differences to the best
one lies above this number; that takes two seeds or more. The baseline is never stopped.

A decision is made once, when all of these runs have logged the step, from what they logged up to there. So it does not
depend on the order of the runs, on restarts, or on how far the runs are. It is a file of the study's folder, which is
written as a whole and not changed afterwards.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapromoe.config.options import Config
from megapromoe.config.reader import option, read_fields

FOLDER = "decisions"  # in the study's folder


@dataclass(frozen=True)
class StopEarly:
    """The section `stop_early`; see the module docstring."""

    steps: tuple[int, ...] = option((), "training steps at which models are compared", kind=list)
    keep: float = option(0.0, "share of the models that go on, by their mean loss; 0: not used", within="[0, 1)")
    difference: float | None = option(None, "loss above the best at which a model stops", kind=float)


def read_stop_early(content: Mapping[str, Any], seeds: Sequence[int]) -> tuple[StopEarly, list[str]]:
    """Reads the section from plain values; returns it and a sentence for each problem."""
    values, problems = read_fields(StopEarly, content, "stop_early.")
    steps = values.get("steps", [])
    if not steps or any(type(step) is not int or step < 1 for step in steps) or sorted(set(steps)) != list(steps):
        problems.append(f"stop_early.steps = {steps!r}: must be ascending training steps, such as [250, 500]")
        steps = ()
    difference = values.get("difference")
    if difference is not None and not 0 <= difference < math.inf:
        problems.append(f"stop_early.difference = {difference!r}: must be a loss, 0 or more")
    if bool(values.get("keep")) == (difference is not None):
        problems.append("stop_early: give one of keep (such as 0.5) and difference (such as 0.002)")
    if difference is not None and len(seeds) < 2:
        problems.append("stop_early.difference: an interval needs two seeds or more; add seeds, or give keep instead")
    return StopEarly(**values | {"steps": tuple(steps)}), problems


def problems_of_steps(section: StopEarly, configs: Sequence[Config]) -> list[str]:
    """Why the models of these configurations cannot be compared at the steps of the section."""
    lengths = {config.train.steps for config in configs}
    if len(lengths) > 1:
        rule = f"compares runs of one length, and the tasks have {min(lengths):,} to {max(lengths):,} steps"
        return [f"stop_early: {rule}; plan a study of one length, without `compute` and an axis train.steps"]
    problems = []
    if section.steps and section.steps[-1] >= min(lengths):
        problems.append(
            f"stop_early.steps = {section.steps[-1]}: must be below the {min(lengths):,} steps of the tasks"
        )
    every = max(config.train.log_every for config in configs)
    if section.steps and section.steps[0] < every:
        problems.append(
            f"stop_early.steps = {section.steps[0]}: nothing is logged before step {every}; give a later step, or"
            " lower train.log_every"
        )
    return problems


def decision_file(folder: Path, step: int) -> Path:
    """The file of the decision at a step; `folder` is that of the study."""
    return folder / FOLDER / f"step-{step:08d}.json"
