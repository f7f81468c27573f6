"""A run that starts from a checkpoint: what it may assume of a checkpoint that does not describe its own model.

Files of weights contain no configuration. Sizes that the run may change follow from the names and shapes of tensors,
as far as they show: classes, grid, channels, patches, experts. Everything else is assumed to be as in the run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megapromoe.config.data_options import UNSET
from megapromoe.config.model_options import UNROUTED, ModelConfig
from megapromoe.config.options import SAMPLING_METHODS, Config
from megapromoe.conversion.stream import ConversionError

Shapes = Mapping[str, tuple[int, ...]]

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_EXPERT = re.compile(r"\.mlp\.(?:deepspeed_moe\.experts\.deepspeed_experts|experts)\.(\d+)\.")
_STACKED = re.compile(r"\.mlp\.experts\.(?:fc1|up_proj)\.weight$")
_KIND = re.compile(r"^(?:master|ema(?:=[^/]+)?)/")  # of files with several kinds of tensors
_OF_WEIGHTS = ("model", "diffusion", "data")  # sections that concern a start from the weights
_METHODS = {"rf": "euler", "ddpm": "ddpm"}


def without_training(sections: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    """The sections of a config that describe its model and data, with a sampler that fits every objective."""
    if not isinstance(sections, Mapping) or not isinstance(sections.get("diffusion", {}), Mapping):
        return sections  # the caller reports it
    kept = {name: values for name, values in sections.items() if name in _OF_WEIGHTS}
    method = _METHODS.get(sections.get("diffusion", {}).get("objective", "rf"), SAMPLING_METHODS[0])
    return {**kept, "sample": {"method": method}}


@dataclass(frozen=True)
class StartingRun:
    """A run that starts from a checkpoint.

    Attributes:
        config: of the run.
    """

    config: Config

    def source_config(self, path: Path, shapes: Shapes) -> Config:
        """The config of a checkpoint that does not contain one.

        Args:
            path: of the checkpoint, for messages.
            shapes: names and shapes of its tensors, in our names, in published ones or in those of DeepSpeed's folders.

        Raises ConversionError if the width, the depth or the condition is not the run's.
        """
        # Empty tensors can have sizes that no file holds.
        shapes = {_KIND.sub("", name): tuple(shape) for name, shape in shapes.items() if math.prod(shape)}
        if problems := list(self._problems(shapes)):
            raise ConversionError(f"{path}: cannot be the start of this run:\n  " + "\n  ".join(problems))
        model, data = self.config.model, replace(self.config.data, source=UNSET, path="")
        parts = {**_sizes(shapes, model), **_experts(shapes, model), **_biases(shapes)}
        return replace(self.config, model=replace(model, **parts), data=data)

    def _problems(self, shapes: Shapes) -> Iterator[str]:
        """A sentence for each size that must be the run's and is not."""
        model = self.config.model
        patches = shapes.get("x_embedder.proj.weight", ())
        if len(patches) == 4 and patches[0] != model.hidden_size:
            yield mismatch(model, "hidden_size", patches[0])
        depth = max((int(match[1]) + 1 for name in shapes if (match := _BLOCK.match(name))), default=0)
        if depth not in (0, model.depth):
            yield mismatch(model, "depth", depth)
        for condition, prefix in (("class", "y_embedder."), ("text", "text_embedder.")):
            if model.condition != condition and any(name.startswith(prefix) for name in shapes):
                yield mismatch(model, "condition", condition)


def mismatch(model: ModelConfig, name: str, source: object) -> str:
    """The sentence for an option of the network that must be the source's."""
    return f"model.{name} = {getattr(model, name)}: must be the source's {source}"


def _sizes(shapes: Shapes, model: ModelConfig) -> dict[str, Any]:
    """The options of classes, input and output that the tensors determine."""
    sizes: dict[str, Any] = {"position_scale": 1.0}  # of models of other projects, whose tables are compared
    patches = shapes.get("x_embedder.proj.weight", ())
    if len(patches) == 4 and patches[2] == patches[3]:
        sizes |= {"in_channels": patches[1], "patch_size": patches[2]}
    patch, channels = sizes.get("patch_size", model.patch_size), sizes.get("in_channels", model.in_channels)
    if (outputs := shapes.get("final_layer.linear.bias", ())) in ((patch**2 * channels,), (2 * patch**2 * channels,)):
        sizes["learn_sigma"] = outputs[0] != patch**2 * channels
    table = shapes.get("y_embedder.embedding_table.weight", ())
    if len(table) == 2 and table[0] > 1 and table[1] == model.hidden_size:
        sizes["num_classes"] = table[0] - 1
    positions = shapes.get("pos_embed", ())
    side = math.isqrt(positions[-2]) if len(positions) >= 2 else 0
    if side and side**2 == positions[-2]:
        sizes["input_size"] = side * patch
    elif "patch_size" in sizes:  # the file does not contain its positions: the grid of the run is assumed
        sizes["input_size"] = model.input_size // model.patch_size * patch
    return sizes


def _experts(shapes: Shapes, model: ModelConfig) -> dict[str, Any]:
    """Whether the source has experts, and how many."""
    if not shapes or model.router in UNROUTED:
        return {}
    numbers = {match[1] for name in shapes if (match := _EXPERT.search(name))}
    stacked = [shape[0] for name, shape in shapes.items() if _STACKED.search(name) and len(shape) == 3]
    if not numbers and not stacked:
        return {"router": "dense"}
    if stacked:
        return {"num_experts": stacked[0]}
    # In published files the unconditional experts are the last ones; in DeepSpeed's folders they have their own names.
    inside = any(".mlp.experts." in name for name in shapes)
    return {"num_experts": max(len(numbers) - (model.unconditional_experts if inside else 0), 1)}


def _biases(shapes: Shapes) -> dict[str, Any]:
    """No balance biases, if the tensors have none; those of the run then start at zero."""
    return {} if any(name.endswith(".balance_bias") for name in shapes) else {"balance_bias": 0.0}
