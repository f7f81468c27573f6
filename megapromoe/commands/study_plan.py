"""`megapromoe study plan` and `recipes`: the recipe of a study, its folder and its estimated cost."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from megapromoe.commands.command_line import refuse_other_words
from megapromoe.io import write_text
from megapromoe.studies.comparison import DEFAULT_SEEDS, compare
from megapromoe.studies.equal_compute import compute_in_words
from megapromoe.studies.estimate import Speed, evaluations_in_words, measure, seconds, table
from megapromoe.studies.extension import in_words as extension_in_words
from megapromoe.studies.extension import plan_or_extend
from megapromoe.studies.gpu_hours import arm_lines
from megapromoe.studies.grid import budget_of
from megapromoe.studies.placement import placement_of
from megapromoe.studies.recipe import Recipe, StudyError, find_recipe, read_recipe, recipe_names
from megapromoe.studies.recipe_changes import changed
from megapromoe.studies.scales import scaled
from megapromoe.studies.study import Study, missing_data, open_study
from megapromoe.work_progress import duration


def plan_study(options: argparse.Namespace) -> int:
    refuse_other_words(options, "STUDY is the only path")
    extension = plan_or_extend(options.study, _recipe(options))
    study = extension.study
    _print_cost(study, options.gpu)
    for line in extension_in_words(extension):
        print(line)
    total = sum(task.flops for task in study.tasks)
    print(f"tasks: {len(study.tasks)}; {total:.3g} FLOPs of training in total; not done: {len(study.missing())}")
    if study.recipe.compute is not None:
        budgets = [budget_of(study.recipe, task.point) for task in study.tasks]
        print(compute_in_words([task.config for task in study.tasks], budgets))
    if evaluations := evaluations_in_words(study):
        print(evaluations)
    if options.throughput or options.measure:
        speeds = dict.fromkeys((task.variant for task in study.tasks), Speed(options.throughput or 0))
        if options.measure:
            speeds = measure(study)
            for name, speed in speeds.items():
                print(f"  {name}: {speed.flops_per_second:.3g} FLOP/s, start-up {duration(speed.start)} (measured now)")
        ranks = sorted({placement_of(study.recipe, task).ranks for task in study.tasks})
        print(
            f"estimate: {duration(seconds(study, speeds))} one task after another, on ranks: "
            + ", ".join(map(str, ranks))
        )
    else:
        print("hours: not estimated; add --measure, or --throughput FLOPS")
    if missing := missing_data(study):
        print(f"cannot be trained yet: {missing}")
    else:
        print(f"to train: megapromoe study run {study.folder}")
    return 0


def _print_cost(study: Study, gpu: str | None) -> None:
    """Prints the tasks of a study and their size, and writes them into tasks.md; GPU-hours if `gpu` is known.

    Args:
        gpu: kind of GPU; None: the recipe's.
    """
    from megapromoe.studies.published_tables import NOT_COMPARABLE, size_lines  # imports scipy

    tasks, gpu = table(study), gpu or study.recipe.gpu
    if gpu is not None:
        tasks += "\n" + "\n".join(arm_lines(study, gpu)) + "\n"
    write_text(study.folder / "tasks.md", tasks, parents=True)
    print(tasks)
    if sizes := list(size_lines(study)):
        print("\n".join(["published sizes and costs:", *sizes, ""]))
    if study.recipe.scale is not None:
        print(NOT_COMPARABLE.format(scale=study.recipe.scale))


def _recipe(options: argparse.Namespace) -> Recipe:
    """The recipe of --recipe or of the name STUDY, or the one that the other options define. Raises StudyError."""
    name = options.recipe
    if name is None and not (options.preset or options.sizes) and options.study.as_posix() in recipe_names():
        name = options.study.as_posix()
    if name is None:
        return _compared(options) if options.scale is None else scaled(_compared(options), options.scale)
    replaced = ("preset", "experts", "sizes", "train_steps", "routers")
    if given := [f"--{option.replace('_', '-')}" for option in replaced if getattr(options, option)]:
        raise StudyError([f"--recipe: defines the models; remove {', '.join(given)}, or write them into the file"])
    recipe = read_recipe(find_recipe(name))
    if options.scale is not None:
        recipe = scaled(recipe, options.scale)
    launcher = shlex.split(options.launcher or "")
    return changed(recipe, options.seeds or (), options.ranks, launcher, options.overrides)


def _compared(options: argparse.Namespace) -> Recipe:
    """The recipe that the options define. Raises StudyError."""
    if bool(options.preset) == bool(options.sizes):
        raise StudyError(["--recipe, --preset or --sizes: give one of them"])
    return compare(
        preset=options.preset or options.sizes[0],
        sizes=options.sizes or (),
        experts=options.experts or (),
        steps=options.train_steps or (),
        seeds=options.seeds or DEFAULT_SEEDS,
        routers=options.routers or ["promoe"],
        ranks=options.ranks or 1,
        launcher=shlex.split(options.launcher or ""),
        settings=dict(text.split("=", 1) for text in options.overrides),
    )


def list_recipes(options: argparse.Namespace) -> int:
    refuse_other_words(options, "`recipes` takes no arguments")
    names = recipe_names()
    width = max(map(len, names))
    print("\n".join(f"{name:{width}}  {read_recipe(find_recipe(name)).title}" for name in names))
    print("plan one: megapromoe study plan NAME, or megapromoe study plan STUDY --recipe NAME; docs/study.md")
    return 0


def open_or_plan(folder: Path) -> Study:
    """The study of a folder. A folder with the name of a recipe is planned first if it holds no study."""
    name = folder.as_posix()
    if (folder / "study.yaml").exists() or name not in recipe_names():
        return open_study(folder)
    study = plan_or_extend(folder, read_recipe(find_recipe(name))).study
    _print_cost(study, None)
    return study
