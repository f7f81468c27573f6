"""Reads float32 masters and AdamW's moments from the files that the ranks of ZeRO-1 and ZeRO-2 wrote.

ZeRO concatenates the parameters of each group to one flat vector, pads its end, and splits it into one partition for
each rank. `zero_pp_rank_N_mp_rank_00_optim_states.pt` holds the partitions of rank N. The names, in order, are in
`param_shapes` of the file of half-precision weights.

Source: DeepSpeed's zero_to_fp32.py and DeepSpeedZeroOptimizer.state_dict.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megapromoe.conversion.adamw import whole_steps
from megapromoe.conversion.containers import strip_wrappers
from megapromoe.conversion.stream import ConversionError, Stored
from megapromoe.conversion.torch_files import read_pickle

_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_PARTITIONS = "single_partition_of_fp32_groups"
_KINDS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shards:
    """The content of the files of all ranks.

    Attributes:
        pieces: kind -> parameter's name -> its index ranges in the ranks' files, float32, in order. The kinds are
            "master" and, if the files have them, AdamW's moments.
        shapes: parameter's name -> shape.
        updates: step count of AdamW; 0 without moments.
        settings: settings of AdamW's first group.
    """

    pieces: dict[str, dict[str, list[Stored]]]
    shapes: dict[str, tuple[int, ...]]
    updates: int
    settings: Mapping[str, Any]


def read_shards(folder: Path, main: Mapping[str, Any]) -> Shards | None:
    """Reads the shards in `folder`, which belong to the weights `main`; None if there are none.

    Raises ConversionError if a shard is missing or malformed, or belongs to other weights.
    """
    files = {int(match[1]): file for file in folder.iterdir() if (match := _FILE.fullmatch(file.name))}
    if not files:
        return None
    if sorted(files) != list(range(len(files))):
        missing = next(rank for rank in range(len(files)) if rank not in files)
        raise ConversionError(
            f"{folder}: has optimizer states of {len(files)} ranks, but none of rank {missing}; copy those of all ranks"
        )
    groups = _groups(folder, main.get("param_shapes"))
    ranks = [_state_of(files[rank]) for rank in range(len(files))]
    pieces: dict[str, dict[str, list[Stored]]] = {"master": {}}
    base = [_base_states(state, len(groups)) for state in ranks]
    has_moments = all(base)
    steps: list[int] = [0]
    settings: Mapping[str, Any] = {}
    for index, names in enumerate(groups):
        _check_group(folder, ranks[0], index, len(files))
        gaps = _paddings(folder, ranks[0], index, len(names))
        vectors = {
            "master": [_partition(files[r], _PARTITIONS, _masters(files[r], s), index) for r, s in enumerate(ranks)]
        }
        if has_moments:
            states = [_moment_state(files[rank], base[rank], index) for rank in range(len(ranks))]
            for kind in _KINDS:
                vectors[kind] = [
                    _flat(files[r], f"{kind} of group {index}", state.get(kind)) for r, state in enumerate(states)
                ]
            group = _group_settings(ranks[0], index)
            steps.append(whole_steps(files[0], "optimizer's step", states[0].get("step", group.get("step"))))
            settings = settings or group
        for kind, parts in vectors.items():
            _cut(folder, kind, parts, names, gaps, len(files), pieces.setdefault(kind, {}))
    shapes = {name: shape for names in groups for name, shape in names.items()}
    _check_rounding(folder, pieces["master"], shapes, main["module"])
    return Shards(pieces, shapes, max(steps), settings)


def _groups(folder: Path, shapes: Any) -> list[dict[str, tuple[int, ...]]]:
    """For each group: parameter's name -> shape, in the order of the flat vector."""
    bad = f"{folder}: has optimizer states of ZeRO, but its weights do not describe their layout (param_shapes)"
    if not isinstance(shapes, list) or not all(isinstance(group, Mapping) for group in shapes):
        raise ConversionError(f"{bad}; convert it with the zero_to_fp32.py of that folder")
    for group in shapes:
        for name, shape in group.items():
            if not isinstance(name, str) or not isinstance(shape, list):
                raise ConversionError(f"{bad}; {name!r} is not a name, or has no shape")
            if not all(type(n) is int and n >= 0 for n in shape):
                raise ConversionError(f"{bad}; {name} has the shape {shape}")
    return [{strip_wrappers(name)[0]: tuple(shape) for name, shape in group.items()} for group in shapes]


def _state_of(file: Path) -> Mapping[str, Any]:
    content = read_pickle(file)
    state = content.get("optimizer_state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise ConversionError(f"{file}: has no optimizer_state_dict, so it is not an optimizer state of ZeRO")
    if "fp32_flat_groups" in state:
        raise ConversionError(f"{file}: is of ZeRO-3, which splits each parameter; merge it with DeepSpeed first")
    return state


def _masters(file: Path, state: Mapping[str, Any]) -> list[Any]:
    partitions = state.get(_PARTITIONS)
    if not isinstance(partitions, list):
        raise ConversionError(f"{file}: has no {_PARTITIONS}, so it holds no float32 weights")
    return partitions


def _base_states(state: Mapping[str, Any], groups: int) -> Mapping[Any, Any] | None:
    """AdamW's states by group; None if there are none, or if the checkpoint is elastic."""
    base = state.get("base_optimizer_state")
    states = base.get("state") if isinstance(base, Mapping) else None
    return states if isinstance(states, Mapping) and all(index in states for index in range(groups)) else None


def _moment_state(file: Path, states: Any, index: int) -> Mapping[str, Any]:
    if not isinstance(states[index], Mapping):
        raise ConversionError(f"{file}: its optimizer state of group {index} is not a mapping")
    return states[index]


def _group_settings(state: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """The saved settings of a parameter group of AdamW, such as the learning rate; empty if there are none."""
    base = state.get("base_optimizer_state")
    groups = base.get("param_groups") if isinstance(base, Mapping) else None
    if isinstance(groups, list) and index < len(groups) and isinstance(groups[index], Mapping):
        return groups[index]
    return {}


def _check_group(folder: Path, state: Mapping[str, Any], index: int, ranks: int) -> None:
    """Raises ConversionError unless a group is split over all ranks."""
    counts = state.get("partition_count", ranks)
    count = counts[index] if isinstance(counts, list) and index < len(counts) else counts
    if count == ranks:
        return
    if _group_settings(state, index).get("moe"):
        raise ConversionError(
            f"{folder}: experts are split over ranks (their groups into {count} partitions, the others into {ranks});"
            " load it with ep_size = 1 and save it again, or convert it with DeepSpeed's ds_to_universal.py"
        )
    raise ConversionError(
        f"{folder}: was written by {count} ranks, but has optimizer states of {ranks}; copy those of all ranks to it"
    )


def _paddings(folder: Path, state: Mapping[str, Any], index: int, parameters: int) -> list[int]:
    """The number of padding elements after each parameter of a group."""
    paddings = state.get("param_alignment_paddings")
    if paddings is None:
        return [0] * parameters
    gaps = paddings[index] if isinstance(paddings, list) and index < len(paddings) else None
    if not isinstance(gaps, list) or len(gaps) != parameters or not all(type(n) is int and n >= 0 for n in gaps):
        raise ConversionError(
            f"{folder}: param_alignment_paddings of group {index} are not a number for each parameter"
        )
    return gaps


def _partition(file: Path, what: str, partitions: list[Any], index: int) -> Stored:
    return _flat(file, f"{what}[{index}]", partitions[index] if index < len(partitions) else None)


def _flat(file: Path, what: str, stored: Any) -> Stored:
    if not isinstance(stored, Stored) or len(stored.shape) != 1 or stored.dtype != torch.float32 or stored.stride:
        raise ConversionError(f"{file}: {what} is missing or not a flat float32 tensor")
    return stored


def _cut(
    folder: Path,
    kind: str,
    parts: list[Stored],
    names: Mapping[str, tuple[int, ...]],
    gaps: list[int],
    ranks: int,
    out: dict[str, list[Stored]],
) -> None:
    """Adds the index ranges of each parameter of a group to `out`; `parts` are the partitions of its flat vector."""
    sizes = [math.prod(shape) for shape in names.values()]
    needed, held = sum(sizes) + sum(gaps), sum(part.shape[0] for part in parts)
    if not needed - (gaps[-1] if gaps else 0) <= held <= needed + 2 * ranks:
        raise ConversionError(
            f"{folder}: the ranks hold {held:,} elements of {kind}, their parameters have {needed:,}; some files are of"
            " another checkpoint"
        )
    start = 0
    for name, size, gap in zip(names, sizes, gaps, strict=True):
        out[name] = _index_ranges(parts, start, start + size)
        start += size + gap


def _index_ranges(parts: list[Stored], start: int, stop: int) -> list[Stored]:
    """The elements start to stop of the concatenation of `parts`, as ranges of the files."""
    out, first = [], 0
    for part in parts:
        last = first + part.shape[0]
        low, high = max(start, first), min(stop, last)
        if low < high:
            offset = part.offset + (low - first) * part.dtype.itemsize
            out.append(Stored(part.file, offset, (high - low,), part.dtype))
        first = last
    return out


def _check_rounding(
    folder: Path, masters: Mapping[str, list[Stored]], shapes: Mapping[str, tuple[int, ...]], module: Mapping[str, Any]
) -> None:
    """Raises ConversionError unless the weights are the rounded masters.

    Only the smallest parameter of each file is compared, which suffices to detect a file of another step.
    """
    weights = {strip_wrappers(name)[0]: stored for name, stored in module.items()}
    smallest: dict[Path, str] = {}
    for name in sorted((name for name in masters if name in weights), key=lambda name: math.prod(shapes[name])):
        for part in masters[name]:
            smallest.setdefault(part.file, name)
    for file, name in smallest.items():
        weight = weights[name].read()
        master = torch.cat([part.read() for part in masters[name]])
        if weight.numel() != master.numel() or not torch.equal(master.to(weight.dtype), weight.view(-1)):
            raise ConversionError(
                f"{file}: {name} in its float32 shards differs from {name} in the weights of {folder}; the files are of"
                " different steps"
            )
