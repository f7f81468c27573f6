"""Changes of a recipe by the options of `study plan`: seeds, ranks, launcher, settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megapromoe.config.renamed_options import present_layer
from megapromoe.config.strict_yaml import UnreadableFile, parse_yaml
from megapromoe.studies.recipe import Recipe, StudyError, make_recipe, recipe_dict

EVALUATE = "evaluate."  # prefix of settings that belong to the section `evaluate`


def changed(
    recipe: Recipe,
    seeds: Sequence[int] = (),
    ranks: int | None = None,
    launcher: Sequence[str] = (),
    settings: Iterable[str] = (),
) -> Recipe:
    """The recipe with other values; those that are not given stay.

    Args:
        launcher: command that starts the processes of a task.
        settings: `section.key=value` for all tasks, or `evaluate.key=value`. Settings of variants take precedence.

    Raises StudyError for a setting that the recipe varies, and for invalid values.
    """
    content = recipe_dict(recipe)
    if seeds:
        content["seeds"] = list(seeds)
    if ranks is not None:
        content["ranks"] = ranks
        if ranks == 1:  # needs no launcher
            content["launcher"] = []
    if launcher:
        content["launcher"] = list(launcher)
    problems: list[str] = []
    words = [text.partition("=") for text in settings]
    layer = [(key.strip(), value.strip()) for key, _, value in words]
    for key, value in present_layer(layer, "command line", problems):
        if key in recipe.axes:
            problems.append(f"{key}={value}: is an axis of the recipe; remove it, or change the axis in a recipe file")
        elif not key.startswith(EVALUATE):
            content["settings"][key] = value
        elif recipe.evaluate is None:
            problems.append(f"{key}={value}: the recipe has no section `evaluate`; remove it, or add it in a file")
        else:
            try:
                content["evaluate"][key.removeprefix(EVALUATE)] = parse_yaml(value)
            except UnreadableFile as error:
                problems.append(f"{key}={value}: {error}")
    if problems:
        raise StudyError(problems)
    return make_recipe(content)
