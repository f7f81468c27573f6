"""The recipe of a study: what varies, what is compared, what is kept equal.

A recipe is YAML:

    preset: digits                       # base preset of all tasks
    settings: {train.steps: 400}         # changes to the preset for all tasks
    axes:                                # every combination; a key of the config, or `preset`
      model.num_experts: [4, 8, 16, 32]
    seeds: [0, 1, 2]
    seed_settings: [train.seed, data.seed]   # keys that a seed sets; tasks with equal seeds train on the same sample
        stream
    variants:
      promoe: {}
      tc: {settings: {model.router: tc}, match: model.expert_ratio}
      dense: {settings: {model.router: dense}, match: model.mlp_ratio, without: [model.num_experts]}
    active_parameters: {like: {model.num_experts: 16}, tolerance: 0.01, multiple: 8}
    compute: {flops: 1.0e+15}            # equal training FLOPs instead of equal steps: see `equal_compute.py`
    baseline: dense                      # differences are computed against this variant
    weights: ema                         # evaluated: ema, ema=DECAY or master; in short runs averages lag behind
    evaluate: {num: 500, every: 100}     # evaluate sampled images: see `image_evaluation.py`
    stop_early: {steps: [200], keep: 0.5}    # end models that are clearly worse: see `early_stopping.py`
    ranks: 1                             # processes of a task, which `launcher` starts
    launcher: []                         # such as [torchrun, --standalone, --nproc-per-node, "{ranks}"]
    nodes: 2                             # of SLURM, for a task; without it, as few as the GPUs need
    gpus_per_node: 8                     # of SLURM
    gpu: a100                            # kind of GPU for which `plan` estimates hours; without it, it estimates none
    title: Routers of the digits         # one line, for lists of recipes

A variant may have its own `ranks`, `launcher`, `nodes` and `gpus_per_node`. `{ranks}` in a word of a launcher stands
for the number of ranks. The number changes no result: every layout trains the same function.

All tasks have train.ema_warmup=true unless `settings` change it.

`active_parameters` makes the comparison fair: all tasks must have as many active parameters as the base with the `like`
settings, within `tolerance`. If a variant has another number, its ratio `match` is solved for, with widths that are
multiples of `multiple`. `without` lists axes that do not apply to a variant: it has one task for all values of such an
axis. `published` of a variant has figures of a paper to show beside ours: see `published.py`. A study that
`scales.py` has made smaller has the name of its `scale`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megapromoe.checkpoint.weights import UnknownWeights, read_weights_choice
from megapromoe.config.reader import ONE_UP, POSITIVE, ZERO_UP, option, read_fields, suggest
from megapromoe.config.renamed_options import RENAMED, present_layer, present_names
from megapromoe.config.resolve import typed_value
from megapromoe.config.strict_yaml import UnreadableFile, read_yaml
from megapromoe.errors import ExitCode, Violations
from megapromoe.planning.machines import MACHINES
from megapromoe.studies.early_stopping import StopEarly, read_stop_early
from megapromoe.studies.image_evaluation import ImageEvaluation, read_image_evaluation
from megapromoe.studies.published import Published, misplaced, published_dict, read_published

RECIPES = Path(__file__).resolve().parent / "recipes"
BUDGET = "compute.flops"  # name of the axis of compute budgets
RATIOS = ("model.expert_ratio", "model.mlp_ratio")
TASK_ORDER = "task_order"  # key of the study.yaml of a study that was extended
_WORDS = re.compile(r"\d+|\D+").findall


class StudyError(Violations):
    """A study or recipe that is not valid; `violations` lists every reason."""

    subject = "the study"
    exit_code = ExitCode.MISCONFIGURED


@dataclass(frozen=True)
class Variant:
    """One of the compared models."""

    name: str
    settings: dict[str, Any] = option({}, "config settings that override those of the study", kind=dict)
    match: str | None = option(None, "the ratio that is solved for, to get equal active parameters", kind=str)
    without: tuple[str, ...] = option((), "axes that do not apply to the variant", kind=list)
    ranks: int = option(0, "processes of its tasks; 0: as the recipe", within=ZERO_UP)
    launcher: tuple[str, ...] = option((), "command that starts them; default: as the recipe", kind=list)
    nodes: int = option(0, "nodes of SLURM for a task; 0: as the recipe", within=ZERO_UP)
    gpus_per_node: int = option(0, "GPUs of a node of SLURM; 0: as the recipe", within=ZERO_UP)
    published: tuple[Published, ...] = option((), "figures of a paper, to show beside ours", kind=list)


@dataclass(frozen=True)
class Equal:
    """How the number of active parameters is kept equal."""

    like: dict[str, Any] = option({}, "settings of the model that defines the number", kind=dict)
    tolerance: float = option(0.01, "largest relative difference", within=POSITIVE)
    multiple: int = option(
        8,
        "solved widths are multiples of this; 8 gives the 16-byte rows that grouped products need in bf16",
        within=ONE_UP,
    )


@dataclass(frozen=True)
class EqualCompute:
    """Which number of training FLOPs all tasks have; their steps are solved for."""

    flops: float = option(0.0, "training FLOPs of each task; 0: from `like` or from an axis", within=ZERO_UP)
    like: dict[str, Any] = option({}, "settings of the training that defines the number", kind=dict)
    tolerance: float = option(0.005, "largest relative difference, because steps are whole", within=POSITIVE)


@dataclass(frozen=True)
class Recipe:
    """The definition of a study; see the module docstring."""

    preset: str = option("", "base preset of all tasks")
    variants: tuple[Variant, ...] = option((), "the compared models", kind=dict)
    settings: dict[str, Any] = option({}, "config settings that override the preset", kind=dict)
    axes: dict[str, tuple] = option({}, "config keys, with the values of each", kind=dict)
    seeds: tuple[int, ...] = option((0,), "seeds of each combination", kind=list)
    seed_settings: tuple[str, ...] = option(("train.seed", "data.seed"), "config keys that a seed sets", kind=list)
    active_parameters: Equal | None = option(None, "how active parameters are kept equal", kind=dict)
    compute: EqualCompute | None = option(None, "how training FLOPs are kept equal", kind=dict)
    baseline: str | None = option(None, "differences are computed against this variant", kind=str)
    weights: str = option("ema", "evaluated weights: ema, ema=DECAY or master")
    evaluate: ImageEvaluation | None = option(None, "how sampled images are evaluated", kind=dict)
    stop_early: StopEarly | None = option(None, "how models that are clearly worse are stopped early", kind=dict)
    ranks: int = option(1, "number of processes of a task", within=ONE_UP)
    launcher: tuple[str, ...] = option((), "command that starts the processes of a task", kind=list)
    nodes: int = option(0, "nodes of SLURM for a task; 0: as few as its GPUs need", within=ZERO_UP)
    gpus_per_node: int = option(
        0, "GPUs of a node of SLURM; 0: 8, unless sbatch is given another number", within=ZERO_UP
    )
    gpu: str | None = option(None, "kind of GPU for which hours are estimated", tuple(MACHINES), kind=str)
    scale: str | None = option(None, "the smaller scale to which the recipe was changed", kind=str)
    # For lists of recipes; not a part of a study.
    title: str = field(default="", compare=False, metadata=option("", "one line for lists of recipes").metadata)
    # Former names of axes in a study.yaml: they are part of the names of its folders.
    former_axes: dict[str, str] = field(default_factory=dict, compare=False)
    # Names of the tasks that a study had before its last extension, in the order of their numbers.
    task_order: tuple[str, ...] = field(default=(), compare=False)


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes in the package; those in a folder have its name before a slash. Numbers are in order."""
    names = (path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))
    return tuple(sorted(names, key=lambda name: ("/" in name, [int(x) if x.isdigit() else x for x in _WORDS(name)])))


def find_recipe(recipe: str) -> Path:
    """The file of a recipe, given by its path or by one of `recipe_names`. Raises StudyError."""
    if recipe in recipe_names():
        return RECIPES / f"{recipe}.yaml"
    path = Path(recipe)
    if not path.suffix and not path.exists():
        raise StudyError([f"--recipe {recipe}: is neither a file nor a recipe; {suggest(recipe, recipe_names())}"])
    return path


def read_recipe(path: Path, saved: bool = False) -> Recipe:
    """The recipe of a YAML file; `saved`: see `make_recipe`. Raises StudyError, naming the file and every problem."""
    try:
        return make_recipe(read_yaml(Path(path)), saved)
    except UnreadableFile as error:
        raise StudyError([f"{path}: {error}; give a recipe"]) from error
    except StudyError as error:
        raise StudyError(f"{path}: {line}" for line in error.violations) from error


def make_recipe(content: Any, saved: bool = False) -> Recipe:
    """The recipe of plain dicts and lists, by present option names.

    Args:
        saved: whether the content is the study.yaml of a study, and not a user's recipe: then its former option names
            give no notice, and stay in the names of the study's folders.

    Raises StudyError with everything that is wrong with its form.
    """
    if not isinstance(content, Mapping):
        raise StudyError([f"a recipe must be a mapping, not a {type(content).__name__}"])
    order = content.get(TASK_ORDER) if saved else None  # of a study; a copy of its study.yaml is a recipe without it
    values, problems = read_fields(Recipe, {key: value for key, value in content.items() if key != TASK_ORDER})
    problems += [f"{key}: is missing; a recipe needs it" for key in ("preset", "variants") if not content.get(key)]
    variants = []
    for name, settings in values.get("variants", {}).items():
        where = f"variants.{name}"
        if not isinstance(settings or {}, dict):
            problems.append(f"{where}: must be a mapping of settings, match, without; {{}} for none")
            continue
        if not re.fullmatch(r"[\w.]+", str(name)):
            problems.append(f"{where}: a name consists of letters, digits, _ and ., since it is used in folder names")
        variant, wrong = read_fields(Variant, settings or {}, f"{where}.")
        problems += wrong
        without = _names(variant.get("without", ()), f"{where}.without", problems)
        variant["without"] = tuple(present_names(without, saved))
        variant["settings"] = _settings(variant.get("settings", {}), f"{where}.settings", problems, saved)
        variant["launcher"] = tuple(map(str, variant.get("launcher", ())))
        variant["published"] = read_published(variant.get("published", ()), f"{where}.published", problems)
        variants.append(Variant(str(name), **variant))
    values["variants"] = tuple(variants)
    names = _names(values.get("axes", {}), "axes", problems)
    axes = {name: values["axes"][name] for name in names}
    former_axes = {RENAMED[key]: key for key in axes if key in RENAMED}
    for present, former in former_axes.items():
        if present in axes:
            problems.append(f"axes.{former}: is the former name of {present}, which is an axis as well; remove one")
    values["axes"] = dict(zip(present_names(axes, saved), axes.values(), strict=True))
    for key, axis in values["axes"].items():
        if not isinstance(axis, list) or not axis or len(set(map(str, axis))) < len(axis):
            problems.append(f"axes.{key} = {axis!r}: must be a list of different values")
            axis = ()
        values["axes"] = values["axes"] | {key: tuple(axis)}
    for arm in variants:
        applying = {key: axis for key, axis in values["axes"].items() if key not in arm.without}
        problems += misplaced(arm.published, applying, f"variants.{arm.name}.published")
    if "active_parameters" in values:
        equal, wrong = read_fields(Equal, values["active_parameters"], "active_parameters.")
        problems += wrong
        like = _settings(equal.get("like", {}), "active_parameters.like", problems, saved)
        values["active_parameters"] = Equal(**equal | {"like": like})
    if BUDGET in values["axes"]:
        budgets = values["axes"][BUDGET]
        values["axes"] |= {BUDGET: tuple(_budget(flops, f"axes.{BUDGET}", problems) for flops in budgets)}
    if "compute" in values or BUDGET in values["axes"]:
        content_of_compute = dict(values.get("compute") or {})
        if "flops" in content_of_compute:
            content_of_compute["flops"] = _budget(content_of_compute["flops"], BUDGET, problems)
        compute, wrong = read_fields(EqualCompute, content_of_compute, "compute.")
        problems += wrong
        like = _settings(compute.get("like", {}), "compute.like", problems, saved)
        values["compute"] = EqualCompute(**compute | {"like": like})
    if "evaluate" in values:
        values["evaluate"], wrong = read_image_evaluation(values["evaluate"])
        problems += wrong
    if "weights" in values:
        try:
            values["weights"] = read_weights_choice(values["weights"])
        except UnknownWeights as error:
            problems.append(str(error))
    seeds = values.get("seeds", [0])
    if "stop_early" in values:
        values["stop_early"], wrong = read_stop_early(values["stop_early"], seeds)
        problems += wrong
    if not seeds or any(type(seed) is not int or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        problems.append(f"seeds = {seeds!r}: must be a list of different whole numbers, 0 or more")
    if values.get("ranks", 1) != 1 and not values.get("launcher"):
        problems.append(f"ranks = {values['ranks']}: needs a launcher, such as [torchrun, --nproc-per-node, '4']")
    problems += _launcher_problems(values)
    values["settings"] = _settings(values.get("settings", {}), "settings", problems, saved)
    seeded = _names(values.get("seed_settings", Recipe.seed_settings), "seed_settings", problems)
    if problems:
        raise StudyError(problems)
    values |= {"seeds": tuple(seeds), "seed_settings": tuple(dict.fromkeys(present_names(seeded, saved)))}
    values["launcher"] = tuple(map(str, values.get("launcher", ())))
    return Recipe(**values, former_axes=former_axes if saved else {}, task_order=tuple(map(str, order or ())))


def _launcher_problems(values: Mapping[str, Any]) -> list[str]:
    """Why the ranks of variants and evaluations, which differ from those of the recipe, would not be started."""
    variants = values["variants"]
    parts = [(f"variants.{variant.name}", variant.ranks, variant.launcher, variant.nodes) for variant in variants]
    if isinstance(evaluate := values.get("evaluate"), ImageEvaluation):
        parts.append(("evaluate", evaluate.ranks, evaluate.launcher, 0))
    problems = []
    for where, ranks, own_launcher, nodes in parts:
        launcher = own_launcher or tuple(map(str, values.get("launcher", ())))
        if ranks > 1 and not launcher:
            example = "[torchrun, --standalone, --nproc-per-node, '{ranks}']"
            problems.append(f"{where}.ranks = {ranks}: needs a launcher, such as {example}")
        started = re.search(r"--nproc[-_]per[-_]node[ =](\d+)", " ".join(launcher))
        if ranks > 1 and nodes <= 1 and started and int(started[1]) != ranks:
            rule = f"its launcher starts {started[1]}; write '{{ranks}}' in the launcher instead of the number"
            problems.append(f"{where}.ranks = {ranks}: {rule}")
    return problems


def launcher_of(launcher: tuple[str, ...], ranks: int) -> tuple[str, ...]:
    """The words of a launcher, with the number of ranks in the place of {ranks}."""
    return tuple(word.replace("{ranks}", str(ranks)) for word in launcher)


def variant_of(recipe: Recipe, name: str) -> Variant:
    """The variant of this name, which exists."""
    return next(variant for variant in recipe.variants if variant.name == name)


def ranks_of(recipe: Recipe, variant: str) -> int:
    """The number of processes of a training of a variant."""
    return variant_of(recipe, variant).ranks or recipe.ranks


def _names(names: Iterable[Any], where: str, problems: list[str]) -> list[str]:
    """The names of options in a part of a recipe; a sentence for each that is not text is appended to `problems`."""
    entries = list(names)
    problems += [f"{where}: {name!r} must be the name of an option" for name in entries if not isinstance(name, str)]
    return [name for name in entries if isinstance(name, str)]


def _budget(value: Any, where: str, problems: list[str]) -> float:
    """A number of FLOPs. YAML reads 1e15, without a point and a sign, as text."""
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else 0.0
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        problems.append(f"{where} = {value!r}: must be a number of FLOPs above 0, such as 1.0e+15")
        return 1.0
    return number


def _settings(settings: Mapping[str, Any], where: str, problems: list[str], saved: bool) -> dict[str, Any]:
    """Settings by present names, with numbers for values that are text.

    Such text comes from a command line and from studies of earlier versions. Values of axes stay unchanged, because
    they are part of folder names.
    """
    present = present_layer(settings.items(), where, problems, saved)
    return {key: typed_value(str(key), value) for key, value in present}


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dicts and lists, which `make_recipe` turns back into an equal recipe."""
    content: dict[str, Any] = {"preset": recipe.preset, "settings": dict(recipe.settings)}
    content["axes"] = {key: list(values) for key, values in recipe.axes.items()}
    content |= {"seeds": list(recipe.seeds), "seed_settings": list(recipe.seed_settings)}
    content["variants"] = {}
    for variant in recipe.variants:
        entry: dict[str, Any] = {
            "settings": dict(variant.settings),
            "match": variant.match,
            "without": list(variant.without),
        }
        entry |= {"ranks": variant.ranks, "launcher": list(variant.launcher)}
        entry |= {"nodes": variant.nodes, "gpus_per_node": variant.gpus_per_node}
        entry["published"] = [published_dict(published) for published in variant.published]
        content["variants"][variant.name] = {key: value for key, value in entry.items() if value}
    if recipe.active_parameters is not None:
        content["active_parameters"] = dict(vars(recipe.active_parameters))
    if recipe.compute is not None:
        content["compute"] = {key: value for key, value in vars(recipe.compute).items() if value}
    if recipe.evaluate is not None:
        section = {key: value for key, value in vars(recipe.evaluate).items() if value}  # without defaults
        content["evaluate"] = {key: list(v) if isinstance(v, tuple) else v for key, v in section.items()}
    if recipe.stop_early is not None:
        content["stop_early"] = {"steps": list(recipe.stop_early.steps)}
        kept = {"keep": recipe.stop_early.keep or None, "difference": recipe.stop_early.difference}
        content["stop_early"] |= {key: value for key, value in kept.items() if value is not None}
    content |= {
        "baseline": recipe.baseline,
        "weights": recipe.weights,
        "ranks": recipe.ranks,
        "launcher": list(recipe.launcher),
        "nodes": recipe.nodes or None,
        "gpus_per_node": recipe.gpus_per_node or None,
        "gpu": recipe.gpu,
        "scale": recipe.scale,
    }
    return {key: value for key, value in content.items() if value is not None}
