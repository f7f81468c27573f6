"""Published figures of a model, in a recipe: what a paper states, from which table, and at which point of the study.

    variants:
      promoe:
        published:
        - source: table 3, ProMoE-B-Flow      # table or figure, and row
          at: {preset: promoe_b}              # values of the axes; {} for a study without axes
          step: 500000                        # training steps; without it, the last step of the task
          guidance: 1.0                       # for figures of sampled images
          images: 50000                       # likewise; without it, `num` of the section `evaluate`
          figures: {FID: 24.44, Inception score: 60.38}

The names of figures of sampled images are those of `megapromoe evaluate`. Other names, such as those of `SIZES` or
"training GPU-hours", are shown as published; values of `SIZES` are known for our models before they are trained.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megapromoe.config.model_options import ModelConfig
from megapromoe.config.reader import ONE_UP, ZERO_UP, option, read_fields
from megapromoe.planning.cost import flops_per_image, parameters

# Figures that follow from the configuration of a model alone. Multiply-adds: one operation each, as papers count.
SIZES = ("parameters", "active parameters", "giga multiply-adds")


@dataclass(frozen=True)
class Published:
    """Figures that a paper states for one model of a study; see the module docstring."""

    source: str = option("", "table and row that state the figures")
    figures: dict[str, float] = option({}, "name of each figure, with its value", kind=dict)
    at: dict[str, Any] = option({}, "values of the study's axes", kind=dict)
    step: int = option(0, "training steps; 0: the last step of the task", within=ZERO_UP)
    guidance: float | None = option(None, "guidance scale of sampled images", kind=float, within=ZERO_UP)
    images: int | None = option(None, "number of sampled images", kind=int, within=ONE_UP)


def read_published(entries: Sequence[Any], where: str, problems: list[str]) -> tuple[Published, ...]:
    """The entries of one variant; a sentence for each violation is appended to `problems`."""
    published = []
    for number, entry in enumerate(entries):
        place = f"{where}[{number}]"
        if not isinstance(entry, Mapping):
            problems.append(f"{place}: must be a mapping with source and figures")
            continue
        values, wrong = read_fields(Published, entry, f"{place}.")
        problems += wrong
        if not str(values.get("source", "")).strip():
            problems.append(f"{place}.source: is missing; name the table and the row that state the figures")
        figures = values.get("figures") or {}
        if not figures:
            problems.append(f"{place}.figures: is missing; give a name and a number for each")
        for name, value in figures.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                problems.append(f"{place}.figures.{name} = {value!r}: must be a number, as published")
        published.append(Published(**values))
    return tuple(published)


def misplaced(published: Sequence[Published], axes: Mapping[str, Sequence[Any]], where: str) -> list[str]:
    """A sentence for each entry that does not belong to exactly one point of the study.

    Args:
        axes: the axes that apply to the variant, with their values.
    """
    problems = []
    for number, entry in enumerate(published):
        place = f"{where}[{number}].at"
        if unknown := [key for key in entry.at if key not in axes]:
            problems.append(f"{place}: {', '.join(unknown)} is not an axis of the variant; remove it")
        if missing := [key for key in axes if key not in entry.at]:
            problems.append(f"{place}: {', '.join(missing)} is missing; give its value, one of those of the axis")
        for key, value in entry.at.items():
            if key in axes and value not in axes[key]:
                problems.append(f"{place}.{key} = {value!r}: is not a value of the axis; its values are {axes[key]}")
    return problems


def published_dict(entry: Published) -> dict[str, Any]:
    """The entry as plain values, which `read_published` turns back into an equal entry."""
    return {key: value for key, value in vars(entry).items() if value or value == 0 and key == "guidance"}


def size_of(model: ModelConfig, figure: str) -> float:
    """The value of one of `SIZES` for a model of ours."""
    count = parameters(model)
    values = {"parameters": count.total, "active parameters": count.active}
    return values.get(figure, flops_per_image(model).forward / 2e9)
