"""Grids of equal compute (iso-FLOP): the operations of a training are given, and its steps follow for each model.

    compute: {flops: 1.0e+15}                # every task trains with this number of floating-point operations
    compute: {like: {train.steps: 400}}      # or with as many as the base with these settings

    axes: {compute.flops: [1.0e+15, 3.0e+15]}     # or several budgets, as an axis

Training takes whole steps. The nearest number of steps is taken, so a task is off its budget by at most half a step; it
is refused if that is more than `compute.tolerance` (0.5 %). The operations are those of `planning/cost.py`: useful ones
of forward and backward, without recomputation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megapromoe.config.options import Config, ConfigError
from megapromoe.planning.cost import flops_per_image
from megapromoe.studies.recipe import BUDGET, EqualCompute, Recipe

STEPS = "train.steps"


def step_flops(config: Config) -> int:
    """Floating-point operations of a training step."""
    return flops_per_image(config.model).training * config.train.global_batch


def solve_steps(name: str, config: Config, budget: float, compute: EqualCompute) -> int:
    """The number of steps whose operations are nearest to a budget.

    Args:
        name: of the variant, for the message.

    Raises ConfigError if they are off by more than the tolerance.
    """
    flops = step_flops(config)
    steps = max(1, round(budget / flops))
    off = steps * flops / budget - 1
    if abs(off) > compute.tolerance:
        enough = _rounded_up(flops / (2 * compute.tolerance))
        plural = "s" if steps > 1 else ""
        raise ConfigError(
            [
                f"compute: {name} takes {flops:.3g} FLOPs a step; {steps} step{plural}, the nearest number, is"
                f" {off:+.1%} off the budget of {budget:.4g}; give a budget of {enough:.3g} or more, lower"
                f" train.global_batch, or raise `tolerance` = {compute.tolerance}"
            ]
        )
    return steps


def problems_of_compute(recipe: Recipe) -> list[str]:
    """What contradicts the section `compute` of a recipe: other places that set the steps, or two budgets."""
    if recipe.compute is None:
        return []
    compute, problems = recipe.compute, []
    budgets = {"axes.compute.flops": BUDGET in recipe.axes, "compute.flops": compute.flops > 0}
    given = [name for name, is_given in (budgets | {"compute.like": bool(compute.like)}).items() if is_given]
    if len(given) != 1:
        what = f"{' and '.join(given)} are given" if given else "no budget is given"
        problems.append(f"compute: {what}; give one of compute.flops, compute.like, and the axis compute.flops")
    if BUDGET in compute.like:
        problems.append(f"compute.like: {BUDGET!r} is no setting; give compute.flops")
    remedy = "is solved for, because the recipe has `compute`; remove it"
    layers: dict[str, Mapping[str, Any]] = {"settings": recipe.settings, "axes": recipe.axes}
    layers |= {f"variants.{variant.name}.settings": variant.settings for variant in recipe.variants}
    problems += [f"{where}: {STEPS} {remedy}" for where, layer in layers.items() if STEPS in layer]
    for variant in recipe.variants:
        if BUDGET in variant.without:
            problems.append(f"variants.{variant.name}.without: every task has a budget; remove {BUDGET}")
    return problems


def compute_in_words(configs: Sequence[Config], budgets: Sequence[float]) -> str:
    """A sentence on the steps of the tasks, and how near their whole numbers come to the budgets."""
    pairs = zip(configs, budgets, strict=True)
    off = max(abs(config.train.steps * step_flops(config) / budget - 1) for config, budget in pairs)
    steps = [config.train.steps for config in configs]
    return (
        f"equal compute: {min(steps):,} to {max(steps):,} steps; whole steps reach the budgets within {off:.2%}"
        f" (allowed: half a step, at most the tolerance)"
    )


def _rounded_up(value: float) -> float:
    """A number with three significant digits that is not below `value`."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(value / unit) * unit
