"""A checkpoint of whatever format as one value, in our logical names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapromoe.config.options import PUBLISHED_ROUTERS, Config, ModelConfig
from megapromoe.config.resolve import resolve
from megapromoe.conversion.stream import ConversionError, Stored
from megapromoe.nn.dit import DiT


@dataclass(frozen=True)
class State:
    """A checkpoint in logical terms.

    Attributes:
        where, format: what was opened.
        config: of the run.
        step, updates: optimizer steps done, and those behind AdamW's moments.
        kinds: those of `KINDS` that it has.
        shapes: of every parameter, by our name, in the order of our model.
        buffers: the model's persistent buffers; also what a published file holds at other values than we would
            compute: "pos_embed", and "ema.NAME" of tensors that are no parameters.
        read: (kind, parameter) -> the whole tensor, float32.
        layout: how it lies in files, in words.
        notes: what a reader should know that was not as expected.
    """

    where: Path
    format: str
    config: Config
    step: int
    updates: int
    kinds: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    buffers: dict[str, Tensor]
    read: Callable[[str, str], Tensor]
    layout: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all kinds of all parameters, float32."""
        return 4 * len(self.kinds) * sum(math.prod(shape) for shape in self.shapes.values())


def model_shapes(config: ModelConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of the parameters and of the persistent buffers of a model, by name, in its order."""
    with torch.device("meta"):
        model = DiT(config)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    everything = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    return parameters, {name: shape for name, shape in everything.items() if name not in parameters}


def config_from(sections: Mapping[str, Mapping[str, Any]], overrides: Iterable[str] = ()) -> Config:
    """The checked config of nested values as `to_dict` gives them, under further overrides.

    Raises ConfigError, or ConversionError if it is no mapping of sections.
    """
    if not isinstance(sections, Mapping) or not all(isinstance(values, Mapping) for values in sections.values()):
        raise ConversionError("the config in the checkpoint is no mapping of sections; give --config FILE")
    try:
        settings = [
            f"{section}.{name}={value if isinstance(value, str) else json.dumps(value)}"
            for section, values in sections.items()
            for name, value in values.items()
        ]
    except (TypeError, ValueError) as error:
        raise ConversionError(f"the config in the checkpoint holds what is no setting ({error})") from error
    return resolve(overrides=[*settings, *overrides])


# ---- for those who open files


def needed(config: Config | None, path: Path) -> Config:
    if config is None:
        raise ConversionError(
            f"{path}: does not say which model it is of; give --config FILE (the config.yaml of the run, or its model"
            " and train sections written down) or --preset NAME"
        )
    return config


def check_published(config: Config, path: Path) -> None:
    """Raises ConversionError for a model that no published checkpoint is of."""
    router = config.model.router
    if router not in PUBLISHED_ROUTERS:
        raise ConversionError(f"{path}: model.router = {router} was never published; use another format")


def check_same(path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ConversionError listing the tensors that differ."""
    found = {name: tuple(shape) for name, shape in found.items()}
    wrong = [f"{name}: the file has {found.get(name)}, the config's model {expected.get(name)}"
             for name in {**expected, **found} if found.get(name) != expected.get(name)]  # fmt: skip
    if wrong:
        shown = "\n  ".join(wrong[:10]) + (f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise ConversionError(
            f"{path}: is of another model than the config's (None: there is no such tensor)\n  {shown}\n"
            "Give the config that it was trained with: --config FILE or --preset NAME."
        )


def place(pieces: dict[tuple[str, str], Any], key: tuple[str, str], row: int | None, stored: Stored | None) -> None:
    if row is None:
        pieces[key] = stored
    else:
        pieces.setdefault(key, {})[row] = stored


def reader(pieces: Mapping[tuple[str, str], Any], shapes: Mapping[str, tuple]) -> Callable[[str, str], Tensor]:
    """Reads tensors of `pieces`: one stored tensor, one for each expert, or None for zeros."""

    def read(kind: str, name: str) -> Tensor:
        out = torch.zeros(shapes[name])
        stored = pieces[kind, name]
        for row, one in stored.items() if isinstance(stored, dict) else [(None, stored)]:
            if one is not None:
                one.read_into(out if row is None else out[row])
        return out

    return read
