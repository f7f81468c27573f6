"""Makes the recipe of a comparison of routers over numbers of experts, sizes and training lengths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megapromoe.config.model_options import ROUTERS
from megapromoe.config.options import Config, ConfigError, to_dict
from megapromoe.config.renamed_options import present_layer
from megapromoe.config.resolve import resolve
from megapromoe.studies.grid import setting_text
from megapromoe.studies.recipe import Recipe, StudyError, make_recipe

DEFAULT_SEEDS = (0, 1, 2)
# Settings that turn the base, a ProMoE, into a baseline: baselines have neither a shared nor an unconditional expert.
# `match` is the ratio that is solved for equal active parameters, `without` lists axes that do not apply to the
# baseline.
_WITHOUT_PROMOE_EXPERTS = {
    "model.shared_expert": False,
    "model.num_shared_experts": 1,
    "model.shared_expert_width": 0,
    "model.unconditional_expert": False,
    "model.num_unconditional_experts": 1,
}
_BASELINES: dict[str, dict[str, Any]] = {
    "dense": {"settings": {}, "match": "model.mlp_ratio", "without": ["model.num_experts"]},
    "conditional": {
        "settings": {"model.unconditional_expert": True},
        "match": "model.expert_ratio",
        "without": ["model.num_experts"],
    },
    "tc": {"settings": {**_WITHOUT_PROMOE_EXPERTS, "model.balance_weight": 0.01}, "match": "model.expert_ratio"},
    "ec": {"settings": _WITHOUT_PROMOE_EXPERTS, "match": "model.expert_ratio"},
    "race": {"settings": _WITHOUT_PROMOE_EXPERTS, "match": "model.expert_ratio"},
    "diffmoe": {"settings": _WITHOUT_PROMOE_EXPERTS, "match": "model.expert_ratio"},
}


def compare(
    preset: str,
    sizes: Sequence[str] = (),
    experts: Sequence[int] = (),
    steps: Sequence[int] = (),
    seeds: Sequence[int] = DEFAULT_SEEDS,
    routers: Sequence[str] = ("promoe",),
    ranks: int = 1,
    launcher: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
) -> Recipe:
    """The recipe that trains every combination; several routers have equal active parameters.

    Args:
        preset: the base preset of all tasks.
        sizes, experts, steps: values of the axes: presets, numbers of routed experts, training steps; empty: from the
        preset.
        launcher: command that starts `ranks` processes, before `-m megapromoe train`.
        settings: changes to the preset for all tasks.

    If only some of the routers accept a setting, such as parallel.ep for a dense model, the variants of the others keep
    the preset's value.

    Raises StudyError.
    """
    wrong = [f"--routers {name}: must be one of {', '.join(ROUTERS)}" for name in routers if name not in ROUTERS]
    settings = dict(present_layer((settings or {}).items(), "command line", wrong))
    if wrong:
        raise StudyError(wrong)
    axes: dict[str, list] = {"preset": list(sizes), "model.num_experts": list(experts), "train.steps": list(steps)}
    variants = {router: _variant(router, axes) for router in routers}
    point = {"model.num_experts": max(experts)} if experts else {}
    models = {"": point, **{router: {**point, **variant["settings"]} for router, variant in variants.items()}}
    fallbacks = _fallbacks(preset, settings, models, routers, ranks)
    for router in routers:
        variants[router]["settings"] |= fallbacks.get(router, {})
    content: dict[str, Any] = {
        "preset": preset,
        "settings": settings,
        "axes": {key: values for key, values in axes.items() if values},
        "seeds": list(seeds),
        "variants": variants,
        "ranks": ranks,
        "launcher": list(launcher),
    }
    if len(routers) > 1:
        like: dict[str, Any] = {"model.num_experts": sorted(experts)[len(experts) // 2]} if experts else {}
        like |= fallbacks.get("", {})  # the router of the preset may not accept a setting
        content["active_parameters"] = {"like": like}
        content["baseline"] = "dense" if "dense" in routers else routers[0]
    else:
        variants[routers[0]].pop("match", None)
    return make_recipe(content)


def _variant(router: str, axes: Mapping[str, list]) -> dict[str, Any]:
    baseline = _BASELINES.get(router, {"settings": {}})
    variant = {**baseline, "settings": {"model.router": router, **baseline["settings"]}}
    if "without" in variant:
        variant["without"] = [axis for axis in variant["without"] if axes.get(axis)]
    return variant


def _fallbacks(
    preset: str,
    settings: Mapping[str, str],
    models: Mapping[str, Mapping[str, Any]],
    routers: Sequence[str],
    ranks: int,
) -> dict[str, dict[str, Any]]:
    """For each model, the values of the preset, or else the defaults, that replace settings it does not accept.

    Args:
        models: changes of each model to `settings`.
        routers: names of the compared models. A setting that none of them accepts is kept, and refused later.
    """
    refused = {name: _refused(preset, {**settings, **model}, settings, ranks) for name, model in models.items()}
    for_all = set.intersection(*(refused[router] for router in routers))
    values: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        for key in sorted(refused[name] - for_all):
            section, _, field = key.partition(".")
            for source in (resolve(preset), Config()):
                value = to_dict(source)[section][field]
                if key not in _refused(preset, {**settings, **model, key: value}, [key], ranks):
                    values.setdefault(name, {})[key] = value
                    break
    return values


def _refused(preset: str, layer: Mapping[str, Any], keys: Iterable[str], ranks: int) -> set[str]:
    """The `keys` whose values the configuration refuses: without such a key, it has fewer problems."""
    problems = _problems(preset, layer, ranks)
    if not problems:
        return set()
    without = {key: {k: value for k, value in layer.items() if k != key} for key in keys}
    return {key for key, less in without.items() if len(_problems(preset, less, ranks)) < len(problems)}


def _problems(preset: str, layer: Mapping[str, Any], ranks: int) -> tuple[str, ...]:
    try:
        resolve(preset, overrides=[f"{key}={setting_text(value)}" for key, value in layer.items()], world=ranks)
    except ConfigError as error:
        return error.violations
    return ()
