"""The recipe of a comparison of routers over numbers of experts, sizes and lengths, from a few values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megapromoe.config.options import ROUTERS
from megapromoe.studies.recipe import Recipe, StudyError, make_recipe

DEFAULT_SEEDS = (0, 1, 2)
# Settings of a baseline over the base, which is a ProMoE: the baselines have neither a shared nor an unconditional
# expert. `match` names the ratio that is solved for equal active parameters, `without` the axes that it does not have.
_WITHOUT_PROMOE_EXPERTS = {"model.shared_expert": False, "model.unconditional_expert": False}
_BASELINES: dict[str, dict[str, Any]] = {
    "dense": {"settings": {}, "match": "model.mlp_ratio", "without": ["model.num_experts"]},
    "tc": {"settings": {**_WITHOUT_PROMOE_EXPERTS, "model.balance_weight": 0.01}, "match": "model.expert_ratio"},
    "ec": {"settings": _WITHOUT_PROMOE_EXPERTS, "match": "model.expert_ratio"},
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
    """The recipe that trains every combination, several routers at equal active parameters.

    Args:
        preset: what all tasks start from.
        sizes, experts, steps: axes, presets, numbers of routed experts and lengths; empty for the preset's own.
        launcher: words that start `ranks` processes, before `-m megapromoe train`.
        settings: over the preset, for all tasks.

    Raises StudyError.
    """
    if wrong := [f"--routers {name}: must be one of {', '.join(ROUTERS)}" for name in routers if name not in ROUTERS]:
        raise StudyError(wrong)
    axes: dict[str, list] = {"preset": list(sizes), "model.num_experts": list(experts), "train.steps": list(steps)}
    variants = {router: _variant(router, axes) for router in routers}
    content: dict[str, Any] = {
        "preset": preset,
        "settings": dict(settings or {}),
        "axes": {key: values for key, values in axes.items() if values},
        "seeds": list(seeds),
        "variants": variants,
        "ranks": ranks,
        "launcher": list(launcher),
    }
    if len(routers) > 1:
        like = {"model.num_experts": sorted(experts)[len(experts) // 2]} if experts else {}
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
