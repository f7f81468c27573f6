"""The recipe of a study: what varies, what is compared, what is held equal.

A recipe is YAML:

    preset: digits                       # what all tasks start from
    settings: {train.steps: 400}         # over the preset, for all
    axes:                                # every combination; a key of the config, or `preset`
      model.num_experts: [4, 8, 16, 32]
    seeds: [0, 1, 2]
    seed_settings: [train.seed, data.seed]   # what a seed sets; tasks of one seed see the same stream
    variants:
      promoe: {}
      tc: {settings: {model.router: tc}, match: model.expert_ratio}
      dense: {settings: {model.router: dense}, match: model.mlp_ratio, without: [model.num_experts]}
    active_parameters: {like: {model.num_experts: 16}, tolerance: 0.01, multiple: 8}
    baseline: dense                      # differences are told against this variant
    weights: ema                         # or master: what is evaluated; in short runs the average lags behind
    evaluate: {num: 500, every: 100}     # images that the checkpoints draw are judged: see `image_evaluation.py`
    ranks: 1                             # processes of a task, which `launcher` starts
    launcher: []                         # such as [torchrun, --standalone, --nproc-per-node, "4"]

The averaged weights of all tasks warm up (train.ema_warmup=true) unless `settings` say otherwise.

`active_parameters` makes the comparison fair: all tasks must have as many active parameters as the base with the `like`
settings, within `tolerance`. Where a variant has not, as it is written, the ratio that its `match` names is solved, in
widths that are multiples of `multiple`. `without` are axes that mean nothing to a variant: it stands once, and not at
each of their values.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapromoe.config.reader import ONE_UP, POSITIVE, option, read_fields, suggest
from megapromoe.config.resolve import typed_value
from megapromoe.config.strict_yaml import UnreadableFile, read_yaml
from megapromoe.errors import ExitCode, Violations
from megapromoe.studies.image_evaluation import ImageEvaluation, read_image_evaluation

RECIPES = Path(__file__).resolve().parent / "recipes"
WEIGHTS = ("ema", "master")
RATIOS = ("model.expert_ratio", "model.mlp_ratio")


class StudyError(Violations):
    """A study that cannot be made as asked; `violations` lists every reason."""

    subject = "the study"
    exit_code = ExitCode.MISCONFIGURED


@dataclass(frozen=True)
class Variant:
    """One of the models that are compared."""

    name: str
    settings: dict[str, Any] = option({}, "of the config, over the study's", kind=dict)
    match: str | None = option(None, "the ratio that is solved for equal active parameters", kind=str)
    without: tuple[str, ...] = option((), "axes that mean nothing to it", kind=list)


@dataclass(frozen=True)
class Equal:
    """How the number of active parameters is held equal."""

    like: dict[str, Any] = option({}, "settings of the model whose number all shall have", kind=dict)
    tolerance: float = option(0.01, "largest relative difference", within=POSITIVE)
    multiple: int = option(
        8, "of solved widths; rows of 16 bytes in bf16, which grouped products ask for", within=ONE_UP
    )


@dataclass(frozen=True)
class Recipe:
    """What a study is; see the module's text."""

    preset: str = option("", "what all tasks start from")
    variants: tuple[Variant, ...] = option((), "the models that are compared", kind=dict)
    settings: dict[str, Any] = option({}, "of the config, over the preset", kind=dict)
    axes: dict[str, tuple] = option({}, "keys of the config, and the values of each", kind=dict)
    seeds: tuple[int, ...] = option((0,), "of each combination", kind=list)
    seed_settings: tuple[str, ...] = option(("train.seed", "data.seed"), "what a seed sets", kind=list)
    active_parameters: Equal | None = option(None, "how they are held equal", kind=dict)
    baseline: str | None = option(None, "differences are taken against this variant", kind=str)
    weights: str = option("ema", "what is evaluated", WEIGHTS)
    evaluate: ImageEvaluation | None = option(None, "images that are drawn and judged", kind=dict)
    ranks: int = option(1, "processes of a task", within=ONE_UP)
    launcher: tuple[str, ...] = option((), "command that starts the processes of a task", kind=list)


def recipe_names() -> tuple[str, ...]:
    """The recipes that come with the package, by name."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def find_recipe(recipe: str) -> Path:
    """The file of a recipe, which is given by its path or is one of `recipe_names`. Raises StudyError."""
    if recipe in recipe_names():
        return RECIPES / f"{recipe}.yaml"
    path = Path(recipe)
    if not path.suffix and not path.exists():
        raise StudyError([f"--recipe {recipe}: is neither a file nor a recipe; {suggest(recipe, recipe_names())}"])
    return path


def read_recipe(path: Path) -> Recipe:
    """The recipe of a YAML file. Raises StudyError, naming the file and everything that is wrong."""
    try:
        return make_recipe(read_yaml(Path(path)))
    except UnreadableFile as error:
        raise StudyError([f"{path}: {error}; give a recipe"]) from error
    except StudyError as error:
        raise StudyError(f"{path}: {line}" for line in error.violations) from error


def make_recipe(content: Any) -> Recipe:
    """The recipe of plain dicts and lists. Raises StudyError with everything that is wrong with its form."""
    if not isinstance(content, Mapping):
        raise StudyError([f"a recipe must be a mapping, not a {type(content).__name__}"])
    values, problems = read_fields(Recipe, content)
    problems += [f"{key}: is missing; a recipe needs it" for key in ("preset", "variants") if not content.get(key)]
    variants = []
    for name, settings in values.get("variants", {}).items():
        where = f"variants.{name}"
        if not isinstance(settings or {}, dict):
            problems.append(f"{where}: must be a mapping of settings, match, without; {{}} for none")
            continue
        if not re.fullmatch(r"[\w.]+", str(name)):
            problems.append(f"{where}: a name is letters, digits, _ and ., since it names folders")
        variant, wrong = read_fields(Variant, settings or {}, f"{where}.")
        problems += wrong
        variant |= {"without": tuple(variant.get("without", ())), "settings": _typed(variant.get("settings", {}))}
        variants.append(Variant(str(name), **variant))
    values["variants"] = tuple(variants)
    for key, axis in values.get("axes", {}).items():
        if not isinstance(axis, list) or not axis or len(set(map(str, axis))) < len(axis):
            problems.append(f"axes.{key} = {axis!r}: must be a list of different values")
            axis = ()
        values["axes"] = values["axes"] | {key: tuple(axis)}
    if "active_parameters" in values:
        equal, wrong = read_fields(Equal, values["active_parameters"], "active_parameters.")
        problems += wrong
        values["active_parameters"] = Equal(**equal | {"like": _typed(equal.get("like", {}))})
    if "evaluate" in values:
        values["evaluate"], wrong = read_image_evaluation(values["evaluate"])
        problems += wrong
    seeds = values.get("seeds", [0])
    if not seeds or any(type(seed) is not int or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        problems.append(f"seeds = {seeds!r}: must be a list of different whole numbers, 0 or more")
    if values.get("ranks", 1) != 1 and not values.get("launcher"):
        problems.append(f"ranks = {values['ranks']}: needs a launcher, such as [torchrun, --nproc-per-node, '4']")
    if problems:
        raise StudyError(problems)
    values |= {key: tuple(values[key]) for key in ("seeds", "seed_settings") if key in values}
    values["launcher"] = tuple(map(str, values.get("launcher", ())))
    values["settings"] = _typed(values.get("settings", {}))
    return Recipe(**values)


def _typed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with numbers where they stand as text: on a command line, and in studies of earlier versions.

    Values of axes stay as they are written, since they name the folders of tasks.
    """
    return {key: typed_value(str(key), value) for key, value in settings.items()}


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dicts and lists; `make_recipe` of it gives an equal one."""
    content: dict[str, Any] = {"preset": recipe.preset, "settings": dict(recipe.settings)}
    content["axes"] = {key: list(values) for key, values in recipe.axes.items()}
    content |= {"seeds": list(recipe.seeds), "seed_settings": list(recipe.seed_settings)}
    content["variants"] = {}
    for variant in recipe.variants:
        entry = {"settings": dict(variant.settings), "match": variant.match, "without": list(variant.without)}
        content["variants"][variant.name] = {key: value for key, value in entry.items() if value}
    if recipe.active_parameters is not None:
        content["active_parameters"] = dict(vars(recipe.active_parameters))
    if recipe.evaluate is not None:
        section = {key: value for key, value in vars(recipe.evaluate).items() if value}
        content["evaluate"] = {key: list(v) if isinstance(v, tuple) else v for key, v in section.items()}
    content |= {
        "baseline": recipe.baseline,
        "weights": recipe.weights,
        "ranks": recipe.ranks,
        "launcher": list(recipe.launcher),
    }
    return {key: value for key, value in content.items() if value is not None}
