"""A checkpoint of whatever format as one value, in our logical names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapromoe.checkpoint.average import Average
from megapromoe.config.options import PUBLISHED_ROUTERS, Config, ModelConfig
from megapromoe.config.resolve import resolve
from megapromoe.conversion.stream import ConversionError, Stored
from megapromoe.nn.dit import DiT
from megapromoe.nn.layers import position_table

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # types of weights that are read


@dataclass(frozen=True)
class State:
    """A checkpoint in logical terms.

    Attributes:
        where, format: what was opened.
        config: of the run.
        step, updates: optimizer steps done, and those behind AdamW's moments; 0 where they are not known.
        kinds: those of `KINDS` that it has.
        shapes: of every parameter, by our name, in the order of our model.
        buffers: the model's persistent buffers; also what a published file holds at other values than we would
            compute: "pos_embed", and "ema.NAME" of tensors that are no parameters.
        read: (kind, parameter) -> the whole tensor, float32.
        layout: how it lies in files, in words.
        notes: what a reader should know that was not as expected.
        converted: of our format, but written by a conversion and not by training.
        average: what is known of the averaged weights; None: nothing.
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
    converted: bool = False
    average: Average | None = None

    @property
    def known_updates(self) -> int | None:
        """`updates`; None of weights without moments, and of converted ones whose moments start at zero.

        Of a snapshot, those of its average.
        """
        if self.kinds == ("ema",) and self.average is not None and not self.converted:
            return self.average.updates
        unknown = "exp_avg" not in self.kinds or (self.converted and self.updates == 0)
        return None if unknown else self.updates

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
    """Raises ConversionError listing the tensors that differ: other shapes, names of the model, names of the file."""
    found = {name: tuple(shape) for name, shape in found.items()}
    shapes = [
        f"{name}: the file has {found[name]}, the config's model {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    lacking = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if not shapes and not lacking and not unknown:
        return
    lines = shapes[:6] + ([f"and {len(shapes) - 6} more of other shapes"] if len(shapes) > 6 else [])
    for what, names in (
        ("the file has, and the model has not", unknown),
        ("the model has, and the file has not", lacking),
    ):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            lines.append(f"{what}: {', '.join(names[:4])}{more}")
    shown = "\n  ".join(lines)
    raise ConversionError(
        f"{path}: is of another model than the config's\n  {shown}\n"
        "Give the config that it was trained with: --config FILE or --preset NAME. `megapromoe convert PATH --what`"
        " lists all that the file holds."
    )


def check_floats(path: Path, tensors: Mapping[str, Stored]) -> list[str]:
    """Notes on parameters that are not float32. Raises ConversionError for those that are no plain numbers."""
    for name, stored in tensors.items():
        if stored.dtype not in FLOATS:
            raise ConversionError(
                f"{path}: {name} is {_name_of(stored.dtype)}; weights must be float32, or bfloat16, float16 or float64:"
                " what is quantised has scales beside it, so restore it with the program that made it"
            )
    notes = []
    for dtype in FLOATS[1:]:
        if count := sum(stored.dtype == dtype for stored in tensors.values()):
            how = "rounded to float32" if dtype == torch.float64 else "widened to float32, which restores no digits"
            notes.append(f"{count} of {len(tensors)} tensors are {_name_of(dtype)}: {how}")
    return notes


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_positions(path: Path, name: str, stored: Stored | None, config: ModelConfig) -> Tensor | None:
    """The position table of a file, float32 (1, S, D), where it differs from ours by rounding; else None.

    The model computes its positions. Raises ConversionError for others, or for another number of them: the model would
    compute something else with these weights.
    """
    if stored is None:
        return None
    ordinary = position_table(config.input_size // config.patch_size, config.hidden_size)[None]
    shape = tuple(stored.shape)
    if shape not in (tuple(ordinary.shape), tuple(ordinary.shape[1:])):
        raise ConversionError(
            f"{path}: its {name} is {shape}, the config's model has {config.tokens} positions of {config.hidden_size}"
            " channels (model.input_size / model.patch_size on each side); give the config that it was trained with"
        )
    if stored.dtype not in FLOATS:
        raise ConversionError(f"{path}: its {name} is {_name_of(stored.dtype)}, and no table of positions")
    value = stored.read().view(ordinary.shape)
    if torch.equal(value, ordinary.to(stored.dtype)):
        return None
    tolerance = max(1e-3, torch.finfo(stored.dtype).eps)
    if not torch.allclose(value.float(), ordinary, rtol=tolerance, atol=tolerance):
        values = ", ".join(f"{v:g}" for v in value.flatten()[:3].tolist())
        raise ConversionError(
            f"{path}: its {name} ({values} ...) is not what the config makes it: the model computes sine and cosine"
            " positions, row by row; a model with other positions cannot be converted"
        )
    return value.float()


def with_masters(state: State) -> State:
    """A state of averages alone whose averages stand for the weights as trained too."""
    return replace(
        state,
        kinds=("master", *state.kinds),
        read=lambda kind, name: state.read("ema" if kind == "master" else kind, name),
    )


def checked(state: State, notes: list[str] | None = None) -> State:
    """The same state, whose `read` looks for NaN and infinity.

    A tensor that holds some raises ConversionError; with `notes`, the first such tensor is noted instead.
    """
    found = False

    def read(kind: str, name: str) -> Tensor:
        nonlocal found
        tensor = state.read(kind, name)
        if is_finite(tensor):
            return tensor
        if notes is None:
            if state.format == "upcycled":
                raise ConversionError(
                    f"{state.where}: {kind} of {name}, made from it, holds NaN or infinity; use less noise or spread"
                )
            raise ConversionError(
                f"{state.where}: {kind} of {name} holds NaN or infinity: its training had gone wrong when it was saved."
                " Use an earlier checkpoint; `megapromoe convert --allow-nonfinite` converts it as it is"
            )
        if not found:
            notes.append(f"{kind} of {name} holds NaN or infinity, and others may too")
        found = True
        return tensor

    for name, buffer in state.buffers.items():
        if buffer.is_floating_point() and not is_finite(buffer) and notes is None:
            raise ConversionError(
                f"{state.where}: {name} holds NaN or infinity; use an earlier checkpoint;"
                " `megapromoe convert --allow-nonfinite` converts it as it is"
            )
    return replace(state, read=read)


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite; without a mask as large as the tensor."""
    return not tensor.numel() or all(math.isfinite(end) for end in tensor.aminmax())


def place(pieces: dict[tuple[str, str], Any], key: tuple[str, str], row: int | None, stored: Any) -> None:
    """Puts a stored tensor (a list, None: see `reader`) where a parameter is read from; `row`: of one expert."""
    if row is None:
        pieces[key] = stored
    else:
        pieces.setdefault(key, {})[row] = stored


def reader(pieces: Mapping[tuple[str, str], Any], shapes: Mapping[str, tuple]) -> Callable[[str, str], Tensor]:
    """Reads tensors of `pieces`: one stored tensor, one for each expert, or None for zeros.

    A list stands for one tensor whose elements, in memory's order, are those of its members one after the other.
    """

    def read(kind: str, name: str) -> Tensor:
        out = torch.zeros(shapes[name])
        stored = pieces[kind, name]
        for row, one in stored.items() if isinstance(stored, dict) else [(None, stored)]:
            flat, start = (out if row is None else out[row]).view(-1), 0
            for part in one if isinstance(one, list) else [one]:
                if part is not None:
                    size = math.prod(part.shape)
                    part.read_into(flat[start : start + size].view(part.shape))
                    start += size
        return out

    return read
