"""Expands a recipe into tasks: every combination of axes, variants and seeds, with its checked configuration."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megapromoe.checkpoint.weights import UnknownWeights, is_average, kind_of
from megapromoe.config.options import Config, ConfigError, ratio_of
from megapromoe.config.resolve import resolve
from megapromoe.planning.cost import flops_per_image, parameters
from megapromoe.studies.early_stopping import problems_of_steps
from megapromoe.studies.equal_compute import STEPS, problems_of_compute, solve_steps, step_flops
from megapromoe.studies.image_evaluation import problems_of
from megapromoe.studies.recipe import BUDGET, RATIOS, Recipe, StudyError, Variant

SHORT = {"model.num_experts": "e", "train.steps": "steps", "preset": "", "model.top_k": "k", "model.hidden_size": "d"}

# Defaults of all tasks, which the recipe's settings override. Runs of a study are short: without warm-up of the decay,
# their averages would consist mostly of the initial weights.
DEFAULTS = {"train.ema_warmup": True}


@dataclass(frozen=True)
class Task:
    """One training run: its index in the study, its values on the axes, its configuration."""

    index: int
    name: str
    variant: str
    seed: int
    point: dict[str, Any]
    config: Config

    @property
    def flops(self) -> int:
        """Useful floating-point operations of the whole training."""
        return flops_per_image(self.config.model).training * self.images

    @property
    def images(self) -> int:
        return self.config.train.steps * self.config.train.global_batch


def expand(recipe: Recipe) -> tuple[Task, ...]:
    """All tasks, ordered by seed, so that an unfinished study contains complete comparisons. The order is fixed.
    In an extended study, the tasks that it had before come first.

    Raises StudyError with all problems: unknown keys, values that would give the same file name, invalid
    configurations, variants whose active parameters cannot be made equal.
    """
    problems: dict[str, list[str]] = {}  # problem -> tasks that have it
    if known := _unknown_names(recipe):
        raise StudyError(known)
    tasks: list[Task] = []
    same: list[str] = []  # different values that would give the same file name
    taken: dict[str, dict] = {}  # name of a task -> its point
    for seed, values in itertools.product(recipe.seeds, itertools.product(*recipe.axes.values())):
        whole_point = dict(zip(recipe.axes, values, strict=True))
        for variant in recipe.variants:
            point = {key: value for key, value in whole_point.items() if key not in variant.without}
            name = "-".join([variant.name, *(_label(recipe, k, v) for k, v in point.items()), f"seed{seed}"])
            if name in taken:  # a variant without an axis has one task; other duplicates are errors
                if taken[name] != point:
                    values_of_both = [
                        f"{k} = {taken[name][k]!r} and {v!r}" for k, v in point.items() if taken[name][k] != v
                    ]
                    same.append(f"{'; '.join(values_of_both)}: both are named {name} in files; rename one of them")
                continue
            taken[name] = point
            try:
                config = _config(recipe, variant, point, whole_point, seed)
            except ConfigError as error:
                for line in error.violations:
                    problems.setdefault(line, []).append(name)
            else:
                tasks.append(Task(len(tasks), name, variant.name, seed, point, config))
    if same:
        raise StudyError(dict.fromkeys(same))
    if (evaluate := recipe.evaluate) is not None and tasks and not problems:
        longest = max(task.config.train.steps for task in tasks)
        if evaluate.every >= longest:
            rule = f"the longest task has {longest} steps, so that only the last checkpoint is evaluated"
            raise StudyError([f"evaluate.every = {evaluate.every}: {rule}; give a smaller number, or remove the key"])
    if recipe.stop_early is not None and tasks and not problems:
        unfit = problems_of_steps(recipe.stop_early, [task.config for task in tasks])
        if unfit:
            raise StudyError(unfit)
    if problems:
        raise StudyError(f"{line} [{_names(names)}]{_remedy(line, tasks)}" for line, names in problems.items())
    return _in_order(tasks, recipe.task_order)


def _in_order(tasks: list[Task], first: tuple[str, ...]) -> tuple[Task, ...]:
    """The tasks with those named in `first` at the beginning, so that tasks keep their numbers in an extended study.

    Raises StudyError if one of the names is no task.
    """
    if unknown := sorted(set(first) - {task.name for task in tasks}):
        raise StudyError([f"task_order: the recipe has no task {_names(unknown)}; restore study.yaml from a copy"])
    place = {name: index for index, name in enumerate(first)}
    ordered = sorted(tasks, key=lambda task: place.get(task.name, len(place)))  # stable: the others stay in order
    return tuple(replace(task, index=index) for index, task in enumerate(ordered))


def _config(recipe: Recipe, variant: Variant, point: dict, whole_point: dict, seed: int) -> Config:
    """The configuration of a task: at equal active parameters, and with the steps of its compute budget."""
    recipe = replace(recipe, ranks=variant.ranks or recipe.ranks)  # over which its configuration is checked
    config, layers = _model_config(recipe, variant, point, whole_point, seed)
    if recipe.compute is None:
        return config
    steps = solve_steps(variant.name, config, budget_of(recipe, whole_point), recipe.compute)
    return _resolve(recipe, *layers, {STEPS: steps})


def budget_of(recipe: Recipe, point: Mapping[str, Any]) -> float:
    """The training FLOPs that a recipe with the section `compute` gives to the tasks of a point."""
    assert recipe.compute is not None
    if BUDGET in point or recipe.compute.flops:
        return point.get(BUDGET, recipe.compute.flops)
    base = _resolve(recipe, recipe.settings, recipe.compute.like)
    return float(step_flops(base) * base.train.steps)


def _model_config(
    recipe: Recipe, variant: Variant, point: dict, whole_point: dict, seed: int
) -> tuple[Config, tuple[Mapping[str, Any], ...]]:
    """The configuration at equal active parameters, and the settings it is made of."""
    seeds = dict.fromkeys(recipe.seed_settings, seed)
    layers: tuple[Mapping[str, Any], ...] = (recipe.settings, variant.settings, point, seeds)
    if recipe.evaluate is not None:
        layers = (*layers, _checkpoint_settings(recipe, layers))
    config = _resolve(recipe, *layers)
    try:
        kind_of(recipe.weights, config.train.ema_decays, f"train.ema_decay = {config.train.ema_decay}")
    except UnknownWeights as error:
        raise ConfigError([str(error)]) from error
    if recipe.evaluate is not None and (problems := problems_of(recipe.evaluate, config)):
        raise ConfigError(problems)
    equal = recipe.active_parameters
    if equal is None:
        return config, layers
    target = parameters(_resolve(recipe, recipe.settings, whole_point, equal.like).model).active
    active = parameters(config.model).active
    if variant.match is not None and abs(active / target - 1) > equal.tolerance:
        ratio = solve_ratio(recipe, layers, variant.match, target, equal.multiple)
        layers = (*layers, {variant.match: ratio})
        config = _resolve(recipe, *layers)
        active = parameters(config.model).active
    if abs(active / target - 1) > equal.tolerance:
        how = f"; its nearest {variant.match} is {_value(config, variant.match)}" if variant.match else ""
        remedy = f"let `match` name a ratio to solve, lower `multiple`, or raise `tolerance` = {equal.tolerance}"
        off = f"has {active:,}, {active / target - 1:+.2%} off the required {target:,}"
        raise ConfigError([f"active_parameters: {variant.name} {off}{how}; {remedy}"])
    return config, layers


def _checkpoint_settings(recipe: Recipe, layers: tuple[Mapping[str, Any], ...]) -> dict[str, Any]:
    """Settings with which a task keeps the evaluated checkpoints. Raises ConfigError if the recipe contradicts them."""
    every = recipe.evaluate.every if recipe.evaluate is not None else 0
    if not every:
        return {}
    train = _resolve(recipe, *layers).train
    settings, problems = {}, []
    names = (
        ("snapshot_every",) if is_average(recipe.weights) else ("save_every", "keep_every")
    )  # snapshots hold only the averages, so they are smaller
    for name in names:
        key, value = f"train.{name}", getattr(train, name)
        if value and every % value == 0:
            continue
        if any(key in layer for layer in layers):
            remedy = f"let it divide {every}, or remove it from the recipe"
            problems.append(f"evaluate.every = {every}: {key} = {value} does not keep the checkpoints; {remedy}")
        settings[key] = every
    if problems:
        raise ConfigError(problems)
    return settings


def solve_ratio(recipe: Recipe, layers: tuple, key: str, target: int, multiple: int) -> float:
    """The ratio whose active parameters are closest to `target`, with a width that is a multiple of `multiple`.

    Active parameters are linear in the width, so two widths determine it. Raises ConfigError if they do not depend on
    it.
    """
    size = _resolve(recipe, *layers).model.hidden_size

    def active(width: int) -> int:
        return parameters(_resolve(recipe, *layers, {key: ratio_of(width, size)}).model).active

    count, doubled_count = active(multiple), active(2 * multiple)
    if count == doubled_count:
        raise ConfigError(
            [
                f"match = {key}: does not change the active parameters of this variant; name the other ratio, or set"
                " model.expert_width to 0"
            ]
        )
    steps = max(1, round(1 + (target - count) / (doubled_count - count)))
    return ratio_of(steps * multiple, size)


def _resolve(recipe: Recipe, *layers: Mapping[str, Any]) -> Config:
    settings: dict[str, Any] = dict(DEFAULTS)
    for layer in layers:
        settings |= layer
    preset = settings.pop("preset", recipe.preset)
    settings.pop(BUDGET, None)  # of an axis; it is no setting
    return resolve(preset, overrides=[f"{key}={setting_text(v)}" for key, v in settings.items()], world=recipe.ranks)


def setting_text(value: Any) -> str:
    """A value as text, to follow `section.key=`."""
    return value if isinstance(value, str) else json.dumps(value)


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _label(recipe: Recipe, key: str, value: Any) -> str:
    if key == BUDGET:
        return f"flops{value:g}".replace("+", "")
    key = recipe.former_axes.get(key, key)
    return f"{SHORT.get(key, key.partition('.')[2] or key)}{re.sub(r'[^A-Za-z0-9_.]', '_', setting_text(value))}"


def _names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _remedy(problem: str, tasks: list[Task]) -> str:
    """The remedy for a setting that only some models of a study accept."""
    if not tasks or problem.startswith(("active_parameters", "match", "evaluate", "compute")):
        return ""
    return "; other tasks accept it: set another value in the `settings` of these variants, which take precedence"


def _unknown_names(recipe: Recipe) -> list[str]:
    """Problems of names in the recipe that do not exist."""
    problems = problems_of_compute(recipe)
    names = [variant.name for variant in recipe.variants]
    axes = ", ".join(recipe.axes) or "none"
    if recipe.baseline is not None and recipe.baseline not in names:
        problems.append(f"baseline = {recipe.baseline!r}: is not a variant; the variants are {', '.join(names)}")
    for variant in recipe.variants:
        where = f"variants.{variant.name}"
        if variant.match is not None and variant.match not in RATIOS:
            problems.append(f"{where}.match = {variant.match!r}: must be {' or '.join(RATIOS)}")
        if variant.match is not None and recipe.active_parameters is None:
            problems.append(f"{where}.match: needs active_parameters, which defines the number to match")
        for key in variant.without:
            if key not in recipe.axes:
                problems.append(f"{where}.without: {key!r} is not an axis; the axes are {axes}")
        for key in set(variant.settings) & set(recipe.axes) - set(variant.without):
            problems.append(f"{where}.settings: {key!r} is an axis; list it in `without` to fix it for this variant")
    return problems
