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
    ranks: 1                             # processes of a task, which `launcher` starts
    launcher: []                         # such as [torchrun, --standalone, --nproc-per-node, "4"]

`active_parameters` makes the comparison fair: all tasks must have as many active parameters as the base with the `like`
settings, within `tolerance`. Where a variant has not, as it is written, the ratio that its `match` names is solved, in
widths that are multiples of `multiple`. `without` are axes that mean nothing to a variant: it stands once, and not at
each of their values.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from megapromoe.config.options import suggest
from megapromoe.errors import UserError

RECIPES = Path(__file__).resolve().parent / "recipes"
WEIGHTS = ("ema", "master")
RATIOS = ("model.expert_ratio", "model.mlp_ratio")


class StudyError(UserError):
    """A study that cannot be made as asked; `violations` lists every reason."""

    exit_code = 2

    def __init__(self, violations: Iterable[str]):
        self.violations = tuple(violations)
        count = "1 problem" if len(self.violations) == 1 else f"{len(self.violations)} problems"
        super().__init__("\n  - ".join([f"{count} in the study:", *self.violations]))


@dataclass(frozen=True)
class Variant:
    """One of the models that are compared."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    match: str | None = None
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Equal:
    """How the number of active parameters is held equal."""

    like: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 0.01
    multiple: int = 8  # rows of 16 bytes in bf16, which grouped products ask for


@dataclass(frozen=True)
class Recipe:
    """What a study is; see the module's text."""

    preset: str
    variants: tuple[Variant, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, tuple] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    seed_settings: tuple[str, ...] = ("train.seed", "data.seed")
    active_parameters: Equal | None = None
    baseline: str | None = None
    weights: str = "ema"
    ranks: int = 1
    launcher: tuple[str, ...] = ()


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
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError([f"{path}: cannot be read ({error.strerror}); give a recipe"]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError([f"{path}: is not YAML: {' '.join(str(error).split())}"]) from error
    try:
        return make_recipe(content)
    except StudyError as error:
        raise StudyError(f"{path}: {line}" for line in error.violations) from error


def make_recipe(content: Any) -> Recipe:
    """The recipe of plain dicts and lists. Raises StudyError with everything that is wrong with its form."""
    if not isinstance(content, Mapping):
        raise StudyError([f"a recipe must be a mapping, not a {type(content).__name__}"])
    problems = _unknown(content, Recipe, "the recipe")
    for key in ("preset", "variants"):
        if not content.get(key):
            problems.append(f"{key}: is missing; a recipe needs it")
    kinds = {"preset": str, "settings": dict, "axes": dict, "seeds": list, "seed_settings": list, "variants": dict}
    kinds |= {"active_parameters": dict, "baseline": str, "weights": str, "ranks": int, "launcher": list}
    problems += _wrong_kinds(content, kinds, "")
    variants, axes = content.get("variants"), content.get("axes") or {}
    for name, said in variants.items() if isinstance(variants, dict) else ():
        where = f"variants.{name}"
        if not isinstance(said or {}, dict):
            problems.append(f"{where}: must be a mapping of settings, match, without; {{}} for none")
            continue
        problems += _unknown(said or {}, Variant, where, but=("name",))
        problems += _wrong_kinds(said or {}, {"settings": dict, "match": str, "without": list}, f"{where}.")
        if not re.fullmatch(r"[\w.]+", str(name)):
            problems.append(f"{where}: a name is letters, digits, _ and ., since it names folders")
    if isinstance(axes, dict):
        for key, values in axes.items():
            if not isinstance(values, list) or not values or len(set(map(str, values))) < len(values):
                problems.append(f"axes.{key} = {values!r}: must be a list of different values")
    equal = content.get("active_parameters")
    if isinstance(equal, dict):
        problems += _unknown(equal, Equal, "active_parameters")
        problems += _wrong_kinds(equal, {"like": dict, "tolerance": float, "multiple": int}, "active_parameters.")
    seeds = content.get("seeds")
    if isinstance(seeds, list) and (not seeds or any(type(s) is not int or s < 0 for s in seeds) or _twice(seeds)):
        problems.append(f"seeds = {seeds!r}: must be a list of different whole numbers, 0 or more")
    if content.get("weights", "ema") not in WEIGHTS:
        problems.append(f"weights = {content['weights']!r}: must be {' or '.join(WEIGHTS)}")
    if type(content.get("ranks", 1)) is int and content.get("ranks", 1) < 1:
        problems.append(f"ranks = {content['ranks']}: must be at least 1")
    if content.get("ranks", 1) != 1 and not content.get("launcher"):
        problems.append(f"ranks = {content['ranks']}: needs a launcher, such as [torchrun, --nproc-per-node, '4']")
    if problems:
        raise StudyError(problems)
    given = {key: value for key, value in content.items() if value is not None}
    given["variants"] = tuple(
        Variant(str(name), **{k: tuple(v) if k == "without" else v for k, v in (said or {}).items()})
        for name, said in variants.items()
    )
    given["axes"] = {key: tuple(values) for key, values in axes.items()}
    for key in ("seeds", "seed_settings", "launcher"):
        if key in given:
            given[key] = tuple(str(v) if key == "launcher" else v for v in given[key])
    if equal is not None:
        given["active_parameters"] = Equal(**equal)
    return Recipe(**given)


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dicts and lists; `make_recipe` of it gives an equal one."""
    said: dict[str, Any] = {"preset": recipe.preset, "settings": dict(recipe.settings)}
    said["axes"] = {key: list(values) for key, values in recipe.axes.items()}
    said |= {"seeds": list(recipe.seeds), "seed_settings": list(recipe.seed_settings)}
    said["variants"] = {}
    for variant in recipe.variants:
        told = {"settings": dict(variant.settings), "match": variant.match, "without": list(variant.without)}
        said["variants"][variant.name] = {key: value for key, value in told.items() if value}
    if recipe.active_parameters is not None:
        said["active_parameters"] = dict(vars(recipe.active_parameters))
    said |= {
        "baseline": recipe.baseline,
        "weights": recipe.weights,
        "ranks": recipe.ranks,
        "launcher": list(recipe.launcher),
    }
    return {key: value for key, value in said.items() if value is not None}


def _twice(values: list) -> bool:
    return len(set(values)) < len(values)


def _unknown(said: Mapping, kind: type, where: str, but: tuple[str, ...] = ()) -> list[str]:
    known = [f.name for f in fields(kind) if f.name not in but]
    lines = []
    for key in said:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            lines.append(f"{where}: {key!r} is no key; {hint}")
    return lines


_WORDS = {str: "text", dict: "a mapping", list: "a list", int: "a whole number", float: "a number above 0"}


def _wrong_kinds(said: Mapping, kinds: Mapping[str, type], prefix: str) -> list[str]:
    wrong = []
    for key, kind in kinds.items():
        value = said.get(key)
        if value is None:
            continue
        good = type(value) is kind
        if kind is float:
            good = type(value) in (int, float) and value > 0
        elif key == "multiple":
            good = type(value) is int and value > 0
        if not good:
            wrong.append(f"{prefix}{key} = {value!r}: must be {_WORDS[kind]}")
    return wrong
