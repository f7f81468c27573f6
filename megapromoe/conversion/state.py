"""`State`: a checkpoint of any format with our logical names, and the checks that its readers share."""

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
from megapromoe.checkpoint.weights import AVERAGE, is_average, kind_of
from megapromoe.config import extensions
from megapromoe.config.model_options import PUBLISHED_ROUTERS, ROUTERS, ModelConfig
from megapromoe.config.options import SAMPLING_METHODS, Config
from megapromoe.config.resolve import resolve
from megapromoe.conversion.starting_run import StartingRun, without_training
from megapromoe.conversion.stream import ConversionError, Stored
from megapromoe.distributed.shard_ranges import ShardRange
from megapromoe.nn.dit import DiT
from megapromoe.nn.layers import position_table

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # supported types of weights


@dataclass(frozen=True)
class State:
    """A checkpoint with logical names.

    Attributes:
        where, format: path and format of the checkpoint.
        config: of the run.
        step, updates: optimizer steps of the run; updates that AdamW's moments contain. 0 if unknown.
        kinds: those of `KINDS` that the checkpoint has, and those of further averages: see `checkpoint/weights.py`.
        shapes: our name -> shape of every parameter, in the order of our model.
        buffers: the model's persistent buffers; also constants whose values in a published file differ from ours:
            "pos_embed", and "ema.NAME" for tensors that are not parameters.
        read: (kind, parameter) -> the whole tensor, float32.
        layout: description of its files.
        notes: messages for the user.
        converted: whether a checkpoint of our format was written by a conversion and not by training.
        average: the settings of the averaged weights of the kind `ema`; None if unknown.
        further_averages: kind -> settings of each other average.
        read_range: (kind, parameter, which elements, out) writes these elements, and zeros for padding, without reading
            the whole tensor; None if the format does not allow that.
        lacks_moments: whether the source has optimizer states that `kinds` leave out, those of Muon.
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
    further_averages: Mapping[str, Average] = field(default_factory=dict)
    read_range: Callable[[str, str, ShardRange, Tensor], None] | None = None
    lacks_moments: bool = False

    @property
    def averages(self) -> dict[str, Average]:
        """The settings of all averages that the checkpoint has, by kind; the first one is `ema`."""
        first = {AVERAGE: self.average or Average(None, None, 0)} if AVERAGE in self.kinds else {}
        return first | dict(self.further_averages)

    @property
    def known_updates(self) -> int | None:
        """`updates`; None for weights without moments, and for converted ones whose moments start at zero.

        Of a snapshot, those of its average.
        """
        if all(map(is_average, self.kinds)) and self.average is not None and not self.converted:
            return self.average.updates
        if self.lacks_moments:
            return self.updates
        unknown = "exp_avg" not in self.kinds or (self.converted and self.updates == 0)
        return None if unknown else self.updates

    @property
    def nbytes(self) -> int:
        """Bytes of all kinds of all parameters, float32."""
        return 4 * len(self.kinds) * sum(math.prod(shape) for shape in self.shapes.values())


def model_shapes(config: ModelConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of the parameters, and of the persistent buffers, of a model: name -> shape, in the model's order."""
    with torch.device("meta"):
        model = DiT(config)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    everything = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    return parameters, {name: shape for name, shape in everything.items() if name not in parameters}


def config_from(sections: Mapping[str, Mapping[str, Any]], overrides: Iterable[str] = ()) -> Config:
    """The checked config of nested values in the form of `to_dict`, with further overrides.

    Raises ConfigError, or ConversionError if `sections` is not a mapping of sections.
    """
    if not isinstance(sections, Mapping) or not all(isinstance(values, Mapping) for values in sections.values()):
        raise ConversionError("the config in the checkpoint is not a mapping of sections; give --config FILE")
    try:
        settings = [
            f"{section}.{name}={value if isinstance(value, str) else json.dumps(value)}"
            for section, values in sections.items()
            for name, value in values.items()
        ]
    except (TypeError, ValueError) as error:
        raise ConversionError(
            f"the config in the checkpoint holds an invalid value ({error}); give --config FILE"
        ) from error
    return resolve(saved=settings, overrides=overrides)


def stored_config(sections: Mapping[str, Mapping[str, Any]], run: StartingRun | None = None) -> Config:
    """`config_from` of a config that is in a checkpoint.

    Args:
        run: the run that starts from the checkpoint. Its own router is then allowed, and what does not concern the
            weights is not read: layout, optimizer, sampler.

    Raises ConversionError if it names code of a user: opening a checkpoint of somebody else must execute none.
    """
    config = config_from(sections if run is None else without_training(sections))
    for point, value, built_in in (
        (extensions.ROUTER, config.model.router, ROUTERS),
        (extensions.SAMPLER, config.sample.method, SAMPLING_METHODS),
    ):
        if value not in (*built_in, *([] if run is None else [run.config.model.router])):
            raise ConversionError(
                f"the config in the checkpoint names code, {point.option} = {value!r}, which is executed only if you"
                " name it: give --config FILE, the config.yaml of the run"
            )
    return config


# ---- checks of the readers


def needed(
    config: Config | None,
    path: Path,
    run: StartingRun | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Config:
    """Returns the config, or the one that a starting run has for a source with tensors of these names and shapes.

    Raises ConversionError if there is none.
    """
    if config is None and run is not None:
        return run.source_config(path, shapes or {})
    if config is None:
        raise ConversionError(
            f"{path}: does not contain the config of its model; give --config FILE (the config.yaml of the run, or a"
            " file with its model and train sections) or --preset NAME"
        )
    return config


# What models of published checkpoints can have.
PUBLISHED_BLOCKS = {
    "activation": ("gelu",),
    "norm": ("layer",),
    "qk_norm": ("none", "layer"),
    "positions": ("sincos",),
    "position_scale": (1.0,),
    "modulation": ("block",),
    "router_input": ("modulated",),
    "condition": ("class",),
}


def check_published(config: Config, path: Path) -> None:
    """Raises ConversionError unless there are published checkpoints with the model's router and blocks."""
    router = config.model.router
    if router not in PUBLISHED_ROUTERS:
        raise ConversionError(
            f"{path}: the published format does not support model.router = {router}; use another format"
        )
    for name, values in (*PUBLISHED_BLOCKS.items(), ("balance_bias", (0.0,))):
        if (value := getattr(config.model, name)) not in values:
            raise ConversionError(
                f"{path}: the published format does not support model.{name} = {value}; use another format"
            )


def check_same(path: Path, actual: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ConversionError, which lists the differences, unless names and shapes are those of the config's model.

    Args:
        path: of the file, for the message.
        actual, expected: name -> shape of the file's tensors and of the model's.
    """
    actual = {name: tuple(shape) for name, shape in actual.items()}
    shapes = [
        f"{name}: the file has {actual[name]}, the config's model {shape}"
        for name, shape in expected.items()
        if name in actual and actual[name] != shape
    ]
    missing = [name for name in expected if name not in actual]
    unknown = [name for name in actual if name not in expected]
    if not shapes and not missing and not unknown:
        return
    lines = shapes[:6] + ([f"and {len(shapes) - 6} more of other shapes"] if len(shapes) > 6 else [])
    for what, names in (
        ("only in the file", unknown),
        ("only in the model", missing),
    ):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            lines.append(f"{what}: {', '.join(names[:4])}{more}")
    shown = "\n  ".join(lines)
    raise ConversionError(
        f"{path}: is of another model than the config's\n  {shown}\n"
        "Give the config of its training: --config FILE or --preset NAME. `megapromoe convert PATH --what` lists the"
        " content of the file."
    )


def check_floats(path: Path, tensors: Mapping[str, Stored]) -> list[str]:
    """Notes on parameters that are not float32. Raises ConversionError for types that are not supported."""
    for name, stored in tensors.items():
        if stored.dtype not in FLOATS:
            raise ConversionError(
                f"{path}: {name} is {_name_of(stored.dtype)}; weights must be float32, bfloat16, float16 or float64;"
                " convert quantised weights with the program that wrote them"
            )
    notes = []
    for dtype in FLOATS[1:]:
        if count := sum(stored.dtype == dtype for stored in tensors.values()):
            how = "rounded to float32" if dtype == torch.float64 else "widened to float32"
            notes.append(f"{count} of {len(tensors)} tensors are {_name_of(dtype)}: {how}")
    return notes


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_positions(path: Path, name: str, stored: Stored | None, config: ModelConfig) -> Tensor | None:
    """The position table of a file, float32 (1, S, D), if it differs from ours by rounding; otherwise None.

    Raises ConversionError for a table of other positions: the model computes its positions, and its output would differ
    from that of the model that the file was trained as.
    """
    if stored is None:
        return None
    side = config.input_size // config.patch_size
    expected = position_table(side, config.hidden_size, config.position_scale)[None]
    shape = tuple(stored.shape)
    if shape not in (tuple(expected.shape), tuple(expected.shape[1:])):
        raise ConversionError(
            f"{path}: its {name} is {shape}, the config's model has {config.tokens} positions of {config.hidden_size}"
            " channels (model.input_size / model.patch_size on each side); give the config of its training"
        )
    if stored.dtype not in FLOATS:
        raise ConversionError(f"{path}: its {name} is {_name_of(stored.dtype)} and not a table of positions")
    value = stored.read().view(expected.shape)
    if torch.equal(value, expected.to(stored.dtype)):
        return None
    tolerance = max(1e-3, torch.finfo(stored.dtype).eps)
    if not torch.allclose(value.float(), expected, rtol=tolerance, atol=tolerance):
        values = ", ".join(f"{v:g}" for v in value.flatten()[:3].tolist())
        raise ConversionError(
            f"{path}: its {name} ({values} ...) differs from the model's sine and cosine positions; a model with other"
            " positions cannot be converted"
        )
    return value.float()


def with_masters(state: State) -> State:
    """A state with averages only, with the averages used for the trained weights too."""
    return replace(
        state,
        kinds=("master", *state.kinds),
        read=lambda kind, name: state.read("ema" if kind == "master" else kind, name),
        read_range=None,
    )


def with_one_average(state: State, weights: str) -> State:
    """The state with one average, as `ema`: the chosen one, or the first if `weights` is "master".

    Args:
        weights: `master`, `ema` or `ema=DECAY`.

    Raises UnknownWeights, which lists the decays, if the checkpoint has no average of that decay.
    """
    averages = state.averages
    kind = kind_of(weights, [average.decay for average in averages.values()], state.where)
    if not is_average(kind) or kind not in averages:
        kind = AVERAGE
    read_range = state.read_range
    return replace(
        state,
        kinds=tuple(k for k in state.kinds if k == AVERAGE or not is_average(k)),
        read=lambda requested, name: state.read(kind if requested == AVERAGE else requested, name),
        read_range=read_range
        and (lambda requested, *rest: read_range(kind if requested == AVERAGE else requested, *rest)),
        average=averages.get(kind, state.average),
        further_averages={},
    )


def checked(state: State, notes: list[str] | None = None) -> State:
    """The same state with a `read` that checks for NaN and infinity.

    It raises ConversionError for such a tensor; with `notes`, it adds a note for the first one instead.
    """
    noted = False

    def read(kind: str, name: str) -> Tensor:
        nonlocal noted
        tensor = state.read(kind, name)
        if is_finite(tensor):
            return tensor
        if notes is None:
            if state.format == "upcycled":
                raise ConversionError(
                    f"{state.where}: {kind} of {name}, made from it, holds NaN or infinity; use less noise or spread"
                )
            raise ConversionError(
                f"{state.where}: {kind} of {name} holds NaN or infinity: its training had diverged when it was saved."
                " Use an earlier checkpoint; `megapromoe convert --allow-nonfinite` converts it unchanged"
            )
        if not noted:
            notes.append(f"{kind} of {name} holds NaN or infinity, and other tensors may too")
        noted = True
        return tensor

    for name, buffer in state.buffers.items():
        if buffer.is_floating_point() and not is_finite(buffer) and notes is None:
            raise ConversionError(
                f"{state.where}: {name} holds NaN or infinity; use an earlier checkpoint;"
                " `megapromoe convert --allow-nonfinite` converts it unchanged"
            )
    return replace(state, read=read, read_range=None)


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite. Needs no mask of the size of the tensor."""
    return not tensor.numel() or all(math.isfinite(end) for end in tensor.aminmax())


def place(pieces: dict[tuple[str, str], Any], key: tuple[str, str], row: int | None, stored: Any) -> None:
    """Adds a stored tensor (or a list, or None: see `reader`) to `pieces`; `row`: index of an expert, or None."""
    if row is None:
        pieces[key] = stored
    else:
        pieces.setdefault(key, {})[row] = stored


def reader(pieces: Mapping[tuple[str, str], Any], shapes: Mapping[str, tuple]) -> Callable[[str, str], Tensor]:
    """A function that reads parameters from `pieces`.

    An entry of `pieces` is a stored tensor, a mapping of experts to stored tensors, or None for zeros. In place of a
    stored tensor there can be a list, whose members hold consecutive ranges of the flattened tensor.
    """

    def read(kind: str, name: str) -> Tensor:
        out = torch.zeros(shapes[name])
        stored = pieces[kind, name]
        for row, entry in stored.items() if isinstance(stored, dict) else [(None, stored)]:
            flat, start = (out if row is None else out[row]).view(-1), 0
            for part in entry if isinstance(entry, list) else [entry]:
                if part is not None:
                    size = math.prod(part.shape)
                    part.read_into(flat[start : start + size].view(part.shape))
                    start += size
        return out

    return read
