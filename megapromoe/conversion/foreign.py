"""Opens the checkpoints of other projects: the ProMoE release's .pth, and DeepSpeed's folders."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapromoe.checkpoint.format import KINDS
from megapromoe.config.options import Config, ModelConfig
from megapromoe.conversion.published_names import constants, is_buffer, published_names
from megapromoe.conversion.state import (
    State,
    check_published,
    check_same,
    config_from,
    model_shapes,
    needed,
    place,
    reader,
)
from megapromoe.conversion.stream import ConversionError, Stored
from megapromoe.conversion.torch_files import read_pickle

EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt")


def open_published(path: Path, config: Config | None) -> State:
    """A .pth of the ProMoE release, or a bare state dict of its names; see `formats.open_state`."""
    tree = read_pickle(path)
    if isinstance(tree, dict) and tree and all(isinstance(value, Stored) for value in tree.values()):
        tree = {"model_state_dict": tree}  # a bare state dict
    sets = {"master": "model_state_dict", "ema": "ema_model_state_dict"}
    found = {kind: tree[key] for kind, key in sets.items() if isinstance(tree, dict) and tree.get(key)}
    if not found:
        holds = ", ".join(map(str, list(tree)[:6])) if isinstance(tree, dict) else type(tree).__name__
        raise ConversionError(f"{path}: holds {holds}; a published checkpoint has model_state_dict")
    for kind, tensors in found.items():
        _check_tensors(path, sets[kind], tensors)
    step = _steps(path, "step", tree.get("step", 0))
    config = needed(config, path)
    check_published(config, path)
    notes = []
    if len(found) == 1:
        (only,) = found
        found = {kind: found[only] for kind in sets}
        notes.append(f"it has {sets[only]} alone, which stands for the masters and for their average")

    shapes, buffer_shapes = model_shapes(config.model)
    order = published_names([*shapes, *buffer_shapes], config.model)
    fixed = constants(config.model)
    expected = {
        theirs: tuple(fixed[theirs].shape) if ours is None else ({**shapes, **buffer_shapes}[ours])[row is not None :]
        for theirs, ours, row in order
    }
    pieces: dict[tuple[str, str], Any] = {}
    buffers: dict[str, Tensor] = {}
    for kind, tensors in found.items():
        # Buffers that only some versions of the release had.
        optional = {n for n in expected if is_buffer(n) and n not in tensors}
        check_same(
            path,
            {n: t.shape for n, t in tensors.items()},
            {n: shape for n, shape in expected.items() if n not in optional},
        )
        for theirs, ours, row in order:
            if ours in shapes:
                place(pieces, (kind, ours), row, tensors[theirs])
                continue
            ordinary = fixed.get(theirs, torch.zeros(expected[theirs]))
            value = tensors[theirs].read() if theirs in tensors else ordinary
            if ours is None and not torch.allclose(value, ordinary, rtol=1e-3, atol=1e-3):
                remedy = "set model.capacity_decay to it"
                if theirs == "pos_embed":
                    remedy = "a model with other positions cannot be converted"
                said = ", ".join(f"{v:g}" for v in value.flatten()[:3].tolist())
                raise ConversionError(f"{path}: {theirs} ({said} ...) is not what the config makes it: {remedy}")
            name = ours or theirs
            if kind == "ema":
                if not torch.equal(value, buffers.get(name, ordinary)):
                    buffers[f"ema.{name}"] = value
            elif ours or not torch.equal(value, ordinary):
                buffers[name] = value
    kinds, updates = tuple(found), 0
    if optimizer := tree.get("optimizer_state_dict"):
        names = [n for n in found["master"] if not is_buffer(n)]
        updates = _moments(path, optimizer, names, {t: (o, r) for t, o, r in order}, pieces, notes, config)
        kinds = KINDS
    else:
        notes.append("it has no optimizer state: moments start at zero")
    read = reader(pieces, shapes)
    return State(path, "published", config, step, updates, kinds, shapes, buffers, read, "1 file", notes)


def _check_tensors(path: Path, name: str, tensors: Any) -> None:
    """Raises ConversionError unless `tensors` is a mapping of names to tensors."""
    if not isinstance(tensors, Mapping) or not all(isinstance(n, str) for n in tensors):
        raise ConversionError(f"{path}: its {name} is no mapping of names to tensors")
    if wrong := [n for n, t in tensors.items() if not isinstance(t, Stored)]:
        raise ConversionError(f"{path}: {name}.{wrong[0]} is no tensor")


def _moments(
    path: Path,
    optimizer: Mapping[str, Any],
    names: list[str],
    places: Mapping[str, tuple[str | None, int | None]],
    pieces: dict[tuple[str, str], Any],
    notes: list[str],
    config: Config,
) -> int:
    """Adds AdamW's moments to `pieces`; returns its steps. `names`: parameters in the optimizer's order."""
    groups, states = _groups_and_states(path, optimizer)
    indices = [index for group in groups for index in group["params"]]
    listed = [name for group in groups for name in group.get("param_names", [])]
    if listed:
        names = listed
    elif len(indices) == len(names) - 1:
        names = [name for name in names if name != "pos_embed"]  # fixed, and not all optimizers are given it
    if unknown := [name for name in names if name not in places]:
        raise ConversionError(f"{path}: its optimizer has {unknown[0]}, which is not of the config's model")
    if len(indices) != len(names):
        raise ConversionError(
            f"{path}: its optimizer has {len(indices)} parameters, its model {len(names)}; they do not belong together"
        )
    steps, missing, shapes = set(), [], model_shapes(config.model)[0]
    for index, name in zip(indices, names, strict=True):
        ours, row = places[name]
        state = states.get(index)
        if ours is None:
            continue
        if state is None:
            missing.append(name)
        else:
            steps.add(_steps(path, f"optimizer's step of {name}", state.get("step")))
        for kind in ("exp_avg", "exp_avg_sq"):
            stored = None if state is None else state.get(kind)
            shape = shapes[ours][row is not None :]
            if state is not None and (not isinstance(stored, Stored) or stored.shape != shape):
                raise ConversionError(f"{path}: the {kind} of {name} is missing or of another shape; it is no AdamW's")
            place(pieces, (kind, ours), row, stored)
    if missing:
        notes.append(f"no moments of {len(missing)} parameters ({missing[0]} ...), which had no gradient yet: zeros")
    if len(steps) > 1:
        notes.append(f"AdamW counts {min(steps)} to {max(steps)} steps; {max(steps)} is taken for all")
    train = config.train
    constants = {"lr": train.lr, "betas": [train.beta1, train.beta2], "eps": train.eps}
    for key, value in (constants | {"weight_decay": train.weight_decay}).items():
        stored_value = groups[0].get(key, value)
        if stored_value != value:
            notes.append(f"its AdamW has {key} = {stored_value}, the config {value}, which will be used")
    return max(steps, default=0)


def _groups_and_states(path: Path, optimizer: Any) -> tuple[list[Mapping[str, Any]], Mapping[Any, Mapping[str, Any]]]:
    """The parameter groups and the states of a torch.optim.AdamW. Raises ConversionError if they are malformed."""
    bad = f"{path}: its optimizer state is not that of torch.optim.AdamW"
    if not isinstance(optimizer, Mapping) or not {"param_groups", "state"} <= optimizer.keys():
        raise ConversionError(f"{bad} (it has no param_groups, or no state)")
    groups, states = optimizer["param_groups"], optimizer["state"]
    if not isinstance(groups, list) or not groups or not all(isinstance(group, Mapping) for group in groups):
        raise ConversionError(f"{bad} (its param_groups are no list of mappings)")
    for group in groups:
        for key, kind, default in (("params", int, None), ("param_names", str, [])):
            values = group.get(key, default)
            if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
                raise ConversionError(f"{bad} ({key} of a group are not a list of {kind.__name__})")
    if not isinstance(states, Mapping) or not all(isinstance(state, Mapping) for state in states.values()):
        raise ConversionError(f"{bad} (its state is no mapping of mappings)")
    return groups, states


def _steps(path: Path, name: str, value: Any) -> int:
    """A number of steps, stored as a number or as a tensor of one element. Raises ConversionError."""
    if isinstance(value, Stored):
        value = value.read().item() if math.prod(value.shape) == 1 else None
    if type(value) not in (int, float) or not 0 <= value < 1 << 53 or value != int(value):
        raise ConversionError(f"{path}: its {name} is no whole number, 0 or more")
    return int(value)


# ---- DeepSpeed


def deepspeed_folder(path: Path, step: int | None) -> Path:
    if list(path.glob("*mp_rank_*_model_states.pt")):
        if step is not None and path.name != f"global_step{step}":
            raise ConversionError(f"step = {step}: {path} is one checkpoint already; leave the step out")
        return path
    tag = (path / "latest").read_text(encoding="utf-8").strip() if step is None else f"global_step{step}"
    if not (path / tag).is_dir() or Path(tag).name != tag:
        there = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir())) or "none"
        raise ConversionError(f"{path / tag}: there is no such checkpoint; there are: {there}")
    return path / tag


def open_deepspeed(path: Path, config: Config | None, step: int | None) -> State:
    """A DeepSpeed folder without tensor parallelism or ZeRO-3, its experts in files of their own.

    Moments are read where the optimizer names its parameters, as what we write does. See `formats.open_state`.
    """
    folder = deepspeed_folder(path, step)
    files = sorted(folder.glob("mp_rank_*_model_states.pt"))
    if [file.name for file in files] != ["mp_rank_00_model_states.pt"]:
        found = ", ".join(p.name for p in files[:3]) or "only ZeRO-3 shards"
        raise ConversionError(
            f"{folder}: is split by tensor parallelism or ZeRO-3 ({found}); merge it with DeepSpeed first"
        )
    main = read_pickle(files[0])
    if not isinstance(main, Mapping) or "module" not in main:
        raise ConversionError(f"{files[0]}: has no module, so it is no checkpoint of DeepSpeed")
    for key in ("module", "ema_module", "megapromoe_buffers"):
        _check_tensors(files[0], key, main[key] if main.get(key) is not None or key == "module" else {})
    said = main.get("megapromoe") or {}
    if not isinstance(said, Mapping):
        raise ConversionError(f"{files[0]}: its megapromoe is no mapping")
    config = config or (config_from(said["config"]) if "config" in said else None)
    config = needed(config, path)
    shapes, buffer_shapes = model_shapes(config.model)
    tensors = dict(main["module"])
    for file in sorted(folder.glob("layer_*_expert_*_model_states.pt")):
        if EXPERT_FILE.fullmatch(file.name):
            experts = read_pickle(file)
            _check_tensors(file, "content", experts)
            tensors |= experts
    places = {theirs: (ours, row) for theirs, ours, row in deepspeed_names([*shapes, *buffer_shapes], config.model)}
    both = {**shapes, **buffer_shapes}
    expected = {theirs: both[ours][row is not None :] for theirs, (ours, row) in places.items()}
    notes: list[str] = []
    averages = main.get("ema_module")
    if averages is None:
        notes.append("it has no averaged weights: the weights stand for them")
    pieces: dict[tuple[str, str], Any] = {}
    for kind, one in (("master", tensors), ("ema", averages or tensors)):
        check_same(folder, {n: t.shape for n, t in one.items()}, {n: s for n, s in expected.items()
              if kind == "master" or one is tensors or places[n][0] in shapes})  # fmt: skip
        for theirs, (ours, row) in places.items():
            if ours in shapes:
                place(pieces, (kind, ours), row, one[theirs])
    kinds: tuple[str, ...] = ("master", "ema")
    updates = 0
    states = folder / "expp_rank_0_mp_rank_00_optim_states.pt"
    optimizer = main.get("optimizer")
    if states.is_file():
        content = read_pickle(states)
        if not isinstance(content, Mapping) or "optimizer" not in content:
            raise ConversionError(f"{states}: has no optimizer, so it is no optimizer state of DeepSpeed")
        optimizer = content["optimizer"]
    if (
        isinstance(optimizer, Mapping)
        and {"param_groups", "state"} <= optimizer.keys()
        and all("param_names" in group for group in _groups_and_states(folder, optimizer)[0])
    ):
        updates = _moments(folder, optimizer, [], places, pieces, notes, config)
        kinds = KINDS
    else:
        notes.append("it has no optimizer state that names its parameters: moments start at zero")
    buffers = {name: tensors[name] for name in buffer_shapes} | (main.get("megapromoe_buffers") or {})
    return State(
        folder,
        "deepspeed",
        config,
        _steps(files[0], "global_steps", main.get("global_steps", 0)),
        updates,
        kinds,
        shapes,
        {name: stored.read() for name, stored in buffers.items()},
        reader(pieces, shapes),
        layout=f"{len(list(folder.glob('*.pt')))} files",
        notes=notes,
    )


def deepspeed_names(names: Iterable[str], config: ModelConfig) -> list[tuple[str, str, int | None]]:
    """(name in DeepSpeed's files, our name, expert's row) of each tensor; an expert's name is that of deepspeed.moe."""
    out: list[tuple[str, str, int | None]] = []
    for name in names:
        prefix, inside, rest = name.partition(".mlp.experts.")
        if inside:
            experts = f"{prefix}.mlp.deepspeed_moe.experts.deepspeed_experts"
            out += [(f"{experts}.{e}.{rest}", name, e) for e in range(config.num_experts)]
        else:
            out.append((name, name, None))
    return out
