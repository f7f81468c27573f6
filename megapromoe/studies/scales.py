"""Makes a recipe smaller, by the mapping that a file in `scales/` declares: the same arms on a CPU.

    class:                        # for recipes of models that are conditioned by a class; likewise `text`
      preset: fashion             # in place of the recipe's preset
      sizes: {promoe_b: 96}       # preset of the recipe -> model.hidden_size, which also replaces an axis `preset`
      settings: {}                # in place of the recipe's settings of data, training, layout and sampling
      routers: {tc: {}}           # settings of the arms with this router, which override those of the recipe
      divide_steps: 500           # training steps, and steps between evaluations, are divided by this number
      evaluate: {num: 500}        # section `evaluate`; guidance scales and checkpoints are the recipe's, if it has them

A smaller recipe keeps the arms and the settings `model.*`, `diffusion.*` and `sample.method` of the recipe, its axes,
seeds and baseline. All its models have equal active parameters at each point. Published figures are dropped: they are
not comparable.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megapromoe.config.presets import PRESETS
from megapromoe.config.reader import suggest
from megapromoe.config.strict_yaml import read_yaml
from megapromoe.studies.image_evaluation import ImageEvaluation, read_image_evaluation
from megapromoe.studies.recipe import Equal, Recipe, StudyError, Variant

SCALES = Path(__file__).resolve().parent / "scales"
_STEPS, _PRESET, _SIZE = "train.steps", "preset", "model.hidden_size"
_KEPT = ("model.", "diffusion.", "sample.method")
_MATCH = {"dense": "model.mlp_ratio"}  # ratio that is solved for equal active parameters; of other routers:
_MATCH_EXPERTS = "model.expert_ratio"


def scale_names() -> tuple[str, ...]:
    """Names of the scales."""
    return tuple(sorted(path.stem for path in SCALES.glob("*.yaml")))


def scaled(recipe: Recipe, name: str) -> Recipe:
    """The recipe at the scale `name`.

    Raises StudyError if there is no such scale, if the recipe has a preset that the scale has no size for or a section
    that it does not change, or if its lengths do not divide.
    """
    if name not in scale_names():
        raise StudyError([f"--scale {name}: is not a scale; {suggest(name, scale_names())}"])
    if recipe.scale is not None:
        raise StudyError([f"--scale {name}: the recipe has the scale {recipe.scale} already; remove the option"])
    if unscaled := [section for section in ("compute", "stop_early") if getattr(recipe, section) is not None]:
        where = f"section {' and '.join(f'`{section}`' for section in unscaled)} of the recipe"
        raise StudyError([f"--scale {name}: has no rule for the {where}; remove it in a copy of the recipe"])
    file = SCALES / f"{name}.yaml"
    has_text = PRESETS.get(recipe.preset, {}).get("model", {}).get("condition") == "text"
    section = read_yaml(file)["text" if has_text else "class"]
    sizes = section["sizes"]
    if unknown := sorted({recipe.preset, *recipe.axes.get(_PRESET, ())} - set(sizes), key=str):
        known = f"it has {', '.join(sizes)}"
        raise StudyError([f"--scale {name}: has no size for the preset {', '.join(map(str, unknown))}; {known}"])
    by = section["divide_steps"]
    settings = {key: value for key, value in recipe.settings.items() if key.startswith(_KEPT)}
    settings = {_SIZE: sizes[recipe.preset], **section["settings"], **settings}
    router = str(settings.get("model.router", PRESETS[recipe.preset]["model"]["router"]))
    if _STEPS in recipe.settings:
        settings[_STEPS] = _divided(recipe.settings[_STEPS], by, name)
    axes = dict(recipe.axes)
    if _STEPS in axes:
        axes[_STEPS] = tuple(_divided(steps, by, name) for steps in axes[_STEPS])
    if _PRESET in axes:
        settings.pop(_SIZE)
        axes = {_SIZE if key == _PRESET else key: values for key, values in axes.items()}
        axes[_SIZE] = tuple(sizes[preset] for preset in recipe.axes[_PRESET])
    return replace(
        recipe,
        preset=section["preset"],
        settings=settings,
        axes=axes,
        variants=tuple(_variant(arm, router, section.get("routers", {})) for arm in recipe.variants),
        active_parameters=Equal(),
        evaluate=_evaluation(recipe.evaluate, section["evaluate"], by, name, has_text),
        ranks=1,
        launcher=(),
        nodes=0,
        gpus_per_node=0,
        gpu=None,
        scale=name,
    )


def _variant(arm: Variant, router: str, routers: dict[str, Any]) -> Variant:
    router = arm.settings.get("model.router", router)
    without = tuple(_SIZE if key == _PRESET else key for key in arm.without)
    settings = {key: value for key, value in arm.settings.items() if key.startswith(_KEPT)} | routers.get(router, {})
    match = arm.match or _MATCH.get(router, _MATCH_EXPERTS)
    arm = replace(arm, ranks=0, launcher=(), nodes=0, gpus_per_node=0)  # all tasks run on one device
    return replace(arm, settings=settings, match=match, without=without, published=())


def _divided(steps: Any, by: int, name: str) -> int:
    if not isinstance(steps, int) or steps % by or not steps:
        raise StudyError([f"--scale {name}: divides steps by {by}, and {steps} is no multiple of it; change it"])
    return steps // by


def _evaluation(
    evaluate: ImageEvaluation | None, section: dict[str, Any], by: int, name: str, has_text: bool
) -> ImageEvaluation | None:
    """The section of the scale with the guidance scales and checkpoints of the recipe.

    A recipe without evaluations stays without, except for texts: the six tasks of scenes replace evaluations that are
    made outside of the study.
    """
    if evaluate is None and not has_text:
        return None
    scale, problems = read_image_evaluation(section)
    if problems:
        raise StudyError([f"{SCALES / name}.yaml: {line}" for line in problems])
    if evaluate is None:
        return scale
    every = _divided(evaluate.every, by, name) if evaluate.every else 0
    return replace(scale, guidance=evaluate.guidance or scale.guidance, every=every)
