"""Writes a `State` in one format each: ours, safetensors, published, DeepSpeed. `exports.py` chooses and checks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapromoe.checkpoint.average import average_metadata
from megapromoe.checkpoint.format import all_kinds
from megapromoe.checkpoint.manifest import MANIFEST, seal
from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.checkpoint.step_folders import folder_of
from megapromoe.checkpoint.tensor_writer import Entry, Progress, entry_of, write_safetensors
from megapromoe.checkpoint.weights import AVERAGE, MASTER
from megapromoe.config.model_options import ModelConfig
from megapromoe.config.options import to_dict
from megapromoe.config.resolve import to_yaml
from megapromoe.conversion.conventions import in_our_sign
from megapromoe.conversion.foreign import deepspeed_names
from megapromoe.conversion.published_names import constants, is_buffer, published_names
from megapromoe.conversion.state import State
from megapromoe.conversion.stream import ConversionError, write_pickle
from megapromoe.io import sync, write_text
from megapromoe.versions import versions


def _entry(state: State, read: Any, kind: str, name: str, row: int | None = None, place: int = 0) -> Entry:
    """The entry of one kind of a parameter, or of one expert (`row`) of it.

    Args:
        read: `state.read`, or `_cached_read` of it.
        place: index of the parameter, for the order of writing.
    """
    if row is None:
        return Entry(state.shapes[name], torch.float32, lambda: read(kind, name), (kind, place, 0))
    return Entry(state.shapes[name][1:], torch.float32, lambda: read(kind, name)[row], (kind, place, row))


def _cached_read(state: State) -> Any:
    """`state.read` with a cache of one tensor, because the experts of a tensor are written one after the other."""
    return lru_cache(maxsize=1)(state.read)


# ---- ours


def write_ours(state: State, folder: Path, notes: list[str], progress: Progress | None) -> None:
    """Writes a run directory with one checkpoint; what the source lacks is stated in `notes`."""
    run = RunDirectory(folder)
    checkpoint = folder_of(run.checkpoints, state.step)
    checkpoint.mkdir(parents=True)
    updates = state.updates
    if "exp_avg" not in state.kinds:
        notes.append("the source has no AdamW moments: they start at zero")
        updates = 0
    if "ema" not in state.kinds:
        notes.append("the source has no averaged weights: they start as copies of the weights")

    def read_flat(kind: str, name: str) -> Tensor:
        if kind not in state.kinds and kind != AVERAGE:
            return torch.zeros(math.prod(state.shapes[name]))
        return state.read(kind if kind in state.kinds else MASTER, name).view(-1)

    entries = {
        f"{kind}/{name}@0": Entry((math.prod(shape),), torch.float32, partial(read_flat, kind, name))
        for name, shape in state.shapes.items()
        for kind in all_kinds(state.averages)
    }
    entries |= {f"buffer/{name}": entry_of(tensor) for name, tensor in state.buffers.items()}
    file = checkpoint / "rank-00000.safetensors"
    size, digest = write_safetensors(file, entries, {"step": str(state.step), "rank": "0"}, progress)
    parts = []
    for name, shape in state.shapes.items():
        full = [[0, n] for n in shape]
        parts.append([name, 0, math.prod(shape), [list(shape), [[full, full]]]])
    manifest = {
        "step": state.step,
        "updates": updates,
        "config": to_dict(state.config),
        "versions": versions(("megapromoe", "torch", "deepspeed")),
        "shapes": {name: list(shape) for name, shape in state.shapes.items()},
        "buffers": sorted(state.buffers),
        "ranks": [{"file": file.name, "size": size, "sha256": digest, "parts": parts}],
    }
    if state.average is not None and AVERAGE in state.kinds:
        # The warm-up of an average counts updates. If these start again at 0, the next start chooses the warm-up.
        averages = [
            average if average.updates <= updates else replace(average, warmup=None, updates=updates)
            for average in state.averages.values()
        ]
        manifest |= average_metadata(averages, updates)
    write_text(checkpoint / MANIFEST, seal(manifest))
    write_text(run.config_file, to_yaml(state.config))
    for path in (checkpoint, run.checkpoints, folder):
        sync(path)


# ---- safetensors, and the weights of a folder of diffusers


def description(state: State, weights: str | None) -> dict[str, Any]:
    """The description that `safe_files.description` reads."""
    content: dict[str, Any] = {"step": state.step, "config": to_dict(state.config)}
    if weights != MASTER and state.average and state.average.initial_share is not None:
        content["initial_share"] = state.average.initial_share
    if state.further_averages:
        content["ema_averages"] = average_metadata(list(state.averages.values()), state.updates)["ema_averages"]
    elif weights == AVERAGE and state.average and len(state.config.train.ema_decays) > 1:
        content["ema_decay"] = state.average.decay
    return content | ({"weights": weights} if weights else {"updates": state.updates})


def weights_alone(state: State, weights: str) -> dict[str, Entry]:
    """The weights of one kind, and the buffers of the blocks. Raises ConversionError if the source has no such kind."""
    if weights not in state.kinds:
        raise ConversionError(f"weights = {weights}: {state.where} has {', '.join(state.kinds)} only")
    entries = {name: _entry(state, state.read, weights, name) for name in state.shapes}
    return entries | {name: entry_of(t) for name, t in state.buffers.items() if name.startswith("blocks.")}


def write_safetensors_file(state: State, file: Path, weights: str | None, progress: Progress | None) -> None:
    """Writes one file: these weights, or all state if `weights` is None."""
    if weights:
        entries = weights_alone(state, weights)
    else:
        entries = {
            f"{kind}/{name}": _entry(state, state.read, kind, name) for kind in state.kinds for name in state.shapes
        }
        entries |= {f"buffer/{name}": entry_of(tensor) for name, tensor in state.buffers.items()}
    metadata = {"format": "pt", "megapromoe": json.dumps(description(state, weights))}
    write_safetensors(file, entries, metadata, progress)


# ---- published


def published_tree(state: State, notes: list[str]) -> dict[str, Any]:
    """The content of a published training file; what it cannot say is stated in `notes`."""
    model = state.config.model
    defaults = ModelConfig()
    for setting in ("time_frequency_shift", "mlp_norm_eps"):
        if (value := getattr(model, setting)) != getattr(defaults, setting):
            notes.append(f"the model uses model.{setting} = {value}; other programs that read the file use DiT's value")
    names = published_names([*state.shapes, *(n for n in state.buffers if n.startswith("blocks."))], model)
    fixed = constants(model)
    # Programs that read published names expect the sign of their convention.
    read = lru_cache(maxsize=1)(in_our_sign(state.read, state.config))
    place = {name: i for i, name in enumerate(state.shapes)}

    def tensors(kind: str) -> dict[str, Entry]:
        out = {}
        for theirs, ours, row in names:
            if ours in state.shapes:
                out[theirs] = _entry(state, read, kind, ours, row, place[ours])
                continue
            name = ours or theirs
            value = state.buffers[name] if name in state.buffers else fixed[theirs]
            out[theirs] = entry_of(state.buffers.get(f"ema.{name}", value) if kind == "ema" else value)
        return out

    tree: dict[str, Any] = {"step": state.step, "model_state_dict": tensors("master")}
    if "ema" in state.kinds:
        tree["ema_model_state_dict"] = tensors("ema")
    if "exp_avg" not in state.kinds:
        notes.append("the source has no AdamW moments, so there is no optimizer_state_dict")
        return tree
    parameters = [place_of for place_of in names if not is_buffer(place_of[0])]
    tree["optimizer_state_dict"] = {
        "state": _adam_states(state, read, parameters, place),
        "param_groups": [_adam_group(state) | {"params": list(range(len(parameters)))}],
    }
    return tree


def _adam_states(state: State, read: Any, names: list, place: Mapping[str, int]) -> dict[int, dict[str, Entry]]:
    """The state of torch.optim.AdamW by parameter index. Constants, which are not parameters of ours, have none."""
    return {
        i: {
            "step": entry_of(torch.tensor(float(state.updates))),
            **{kind: _entry(state, read, kind, ours, row, place[ours]) for kind in ("exp_avg", "exp_avg_sq")},
        }
        for i, (_, ours, row) in enumerate(names)
        if ours in state.shapes and state.updates
    }


def _adam_group(state: State) -> dict[str, Any]:
    """The settings of a parameter group of torch.optim.AdamW, without its parameters."""
    t = state.config.train
    group = {"lr": t.lr, "betas": (t.beta1, t.beta2), "eps": t.eps, "weight_decay": t.weight_decay}
    switches = {name: False for name in ("amsgrad", "maximize", "capturable", "differentiable")}
    return group | switches | {"foreach": None, "fused": None, "decoupled_weight_decay": True}


# ---- DeepSpeed


def write_deepspeed(state: State, root: Path, progress: Progress | None) -> None:
    """Writes a folder in the format of DeepSpeed's engine without ZeRO on one rank; our additions have their own keys.

    Source: DeepSpeedEngine._save_moe_checkpoint and its `client_state`.
    """
    model = state.config.model
    folder = root / f"global_step{state.step}"
    folder.mkdir(parents=True)
    buffers = [name for name in state.buffers if name.startswith("blocks.")]
    names = deepspeed_names(state.shapes, model)
    read = _cached_read(state)
    place = {name: i for i, name in enumerate(state.shapes)}

    def tensors(kind: str, wanted) -> dict[str, Entry]:
        return {t: _entry(state, read, kind, o, row, place[o]) for t, o, row in names if wanted(o, row)}

    optimizer = None
    if "exp_avg" in state.kinds:
        groups = [("", [n for n in names if n[2] is None]), ("ep_size_1", [n for n in names if n[2] is not None])]
        all_names = [name for _, members in groups for name in members]
        listed, first = [], 0
        for label, members in groups:
            if members:
                ids = list(range(first, first + len(members)))
                fields = {"params": ids, "param_names": [name for name, _, _ in members], "name": label or "dense"}
                listed.append(_adam_group(state) | fields | {"moe": bool(label)})
                first += len(members)
        optimizer = {"state": _adam_states(state, read, all_names, place), "param_groups": listed}

    module = tensors("master", lambda ours, row: row is None)
    module |= {name: entry_of(state.buffers[name]) for name in buffers}
    experts = [model.num_experts] if model.moe_blocks else []
    main: dict[str, Any] = {
        "module": module,
        "buffer_names": buffers,
        "optimizer": None if experts else optimizer,
        **dict.fromkeys(("param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments")),
        **dict.fromkeys(("lr_scheduler", "data_sampler", "random_ltd", "ds_autoep_layers")),
        "skipped_steps": state.step - state.updates if optimizer else 0,
        "global_steps": state.step,
        "global_samples": state.step * state.config.train.global_batch,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": version("deepspeed"),
        "num_experts": experts * len(model.moe_blocks),
        "megapromoe": {"config": to_dict(state.config)},
        "megapromoe_buffers": {name: entry_of(t) for name, t in state.buffers.items() if name not in buffers},
    }
    if "ema" in state.kinds:
        main["ema_module"] = tensors("ema", lambda ours, row: True)
    write_pickle(folder / "mp_rank_00_model_states.pt", main, progress)
    for layer, block in enumerate(model.moe_blocks):
        for expert in range(model.num_experts):
            inside = f"blocks.{block}.mlp.experts."
            weights = tensors("master", lambda ours, row, i=inside, e=expert: ours.startswith(i) and row == e)
            write_pickle(folder / f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt", weights, progress)
    if experts and optimizer:
        write_pickle(folder / "expp_rank_0_mp_rank_00_optim_states.pt", {"optimizer": optimizer}, progress)
    sync(folder)
    write_text(root / "latest", folder.name)
