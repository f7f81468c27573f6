"""Writes a `State` in every format, tensor by tensor.

The destination gets its name when all of its data is on disk.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapromoe.checkpoint.average import average_metadata, share_in_words
from megapromoe.checkpoint.format import all_kinds
from megapromoe.checkpoint.manifest import MANIFEST, seal
from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.checkpoint.step_folders import folder_of
from megapromoe.checkpoint.tensor_writer import Entry, Progress, entry_of, write_safetensors
from megapromoe.checkpoint.weights import AVERAGE, MASTER, is_average
from megapromoe.config.model_options import ModelConfig
from megapromoe.config.options import to_dict
from megapromoe.config.resolve import to_yaml
from megapromoe.conversion import diffusers_folder
from megapromoe.conversion.conventions import in_our_sign
from megapromoe.conversion.diffusers_folder import FolderParts
from megapromoe.conversion.foreign import deepspeed_names
from megapromoe.conversion.formats import detect
from megapromoe.conversion.published_names import constants, is_buffer, published_names
from megapromoe.conversion.state import State, check_published, checked, with_masters, with_one_average
from megapromoe.conversion.stream import ConversionError, write_pickle
from megapromoe.io import atomic_tree, sync, write_text
from megapromoe.versions import versions


def export(
    state: State,
    destination: Path,
    form: str,
    weights: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    allow_nonfinite: bool = False,
    parts: FolderParts | None = None,
) -> list[str]:
    """Writes `state` to `destination`; returns notes for the user.

    Args:
        state: the checkpoint.
        destination: file or folder.
        form: one of `formats.FORMATS`. "ours" writes a run directory that `megapromoe train` resumes.
        weights: "master", "ema" or "ema=DECAY": write only these weights. None: "ema" for diffusers, the full state for
            safetensors. The formats published and deepspeed hold the trained weights and one average: "ema=DECAY"
            chooses it, None takes the first. "ours" holds all of them.
        overwrite: replace a destination that is a checkpoint.
        progress: called with the number of bytes of each tensor.
        allow_nonfinite: write NaN and infinity, with a note, in place of an error.
        parts: what a folder of diffusers holds besides the weights.

    Raises ConversionError if the destination exists or does not fit the format, or if a tensor is not finite;
    UnknownWeights if the source has no average of that decay.
    """
    destination = Path(destination)
    if weights is not None and form not in ("safetensors", "diffusers") and not _chooses_average(form, weights):
        raise ConversionError(f"weights = {weights}: the format {form} holds both weights; leave the weights out")
    parts = parts or FolderParts()
    if form == "diffusers":
        diffusers_folder.check_folder(state.config, parts)
    _check_destination(state, destination, form, overwrite)
    _check_room(state, destination, form, weights)
    notes: list[str] = []
    if weights is not None or not _holds_all_averages(form):
        if weights is None and state.further_averages:
            first, *others = state.averages
            notes.append(f"{form} holds one average: {first}; not written: {', '.join(others)}; see --weights")
        state = with_one_average(state, weights or AVERAGE)
        weights = AVERAGE if weights is not None and is_average(weights) else weights
    if MASTER not in state.kinds and form not in ("safetensors", "diffusers"):
        notes.append("the source is a snapshot with averages only: they are used for the trained weights too")
        state = with_masters(state)
    state = checked(state, notes if allow_nonfinite else None)
    with atomic_tree(destination, overwrite) as staging:
        if form == "ours":
            _write_ours(state, staging, notes, progress)
        elif form == "published":
            write_pickle(staging, _published_tree(state, notes), progress)
        elif form == "safetensors":
            _write_safetensors(state, staging, weights, progress)
        elif form == "diffusers":
            entries, facts = _weights(state, weights or AVERAGE), _description(state, weights or AVERAGE)
            notes += diffusers_folder.write_folder(state.config, entries, facts, staging, parts, progress)
        elif form == "deepspeed":
            _write_deepspeed(state, staging, progress)
        else:
            raise ConversionError(f"{form!r} is not a known format")
    return notes


def _holds_all_averages(form: str) -> bool:
    """Whether a format can hold several averages."""
    return form in ("ours", "safetensors")


def _chooses_average(form: str, weights: str) -> bool:
    """Whether `weights` chooses the one average of a format that holds the trained weights too."""
    return not _holds_all_averages(form) and is_average(weights) and weights != AVERAGE


def written_weights(state: State, form: str, weights: str | None) -> str:
    """A description of the weights that `export` writes, with the share of the initial weights in averaged ones.

    Raises UnknownWeights if the source has no average of that decay.
    """
    alone = weights or (AVERAGE if form == "diffusers" else None)
    if alone == MASTER:
        return "weights as trained (master)"
    if alone is not None or not _holds_all_averages(form):
        state = with_one_average(state, alone or AVERAGE)
    share = share_in_words(state.average.initial_share if state.average and AVERAGE in state.kinds else None)
    if alone is not None and (form in ("safetensors", "diffusers")):
        return f"averaged weights ({alone}), {share}"
    if AVERAGE not in state.kinds:
        return f"all state ({', '.join(state.kinds)})"
    chosen = "" if alone is None else f" of {alone}"
    others = "".join(f"; {kind}, {average.in_words()}" for kind, average in state.further_averages.items())
    return f"all state ({', '.join(state.kinds)}); ema is the averaged weights{chosen}, {share}{others}"


def _check_destination(state: State, destination: Path, form: str, overwrite: bool) -> None:
    if form == "published":
        check_published(state.config, destination)
    suffixes = {"published": (".pth", ".pt"), "safetensors": (".safetensors",)}.get(form, ())
    if suffixes and destination.suffix not in suffixes:
        raise ConversionError(f"{destination}: {form} is one file; its name must end in {' or '.join(suffixes)}")
    if not suffixes and destination.suffix in (".pth", ".pt", ".safetensors"):
        raise ConversionError(f"{destination}: {form} is a folder; give the name of a folder")
    target, source = destination.resolve(), state.where.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise ConversionError(f"{destination}: is inside the source {state.where}, or contains it; choose another")
    if not destination.exists():
        return
    if not overwrite:
        raise ConversionError(f"{destination}: exists; choose another, or --overwrite")
    if destination.is_dir() and any(destination.iterdir()):
        if RunDirectory(destination).metrics.exists() or RunDirectory(destination).lock_file.exists():
            raise ConversionError(
                f"{destination}: is a run with training results, which is never overwritten; choose another"
            )
        detect(destination)  # raises if it is not a checkpoint: --overwrite does not replace other folders


def exported_bytes(state: State, form: str, weights: str | None = None) -> int:
    """The bytes of parameters that `export` writes with the same arguments; names and buffers add very little."""
    if form == "ours":
        kinds = len(all_kinds(state.averages))
    elif form == "diffusers" or (weights and form == "safetensors"):
        kinds = 1
    else:
        kinds = len(state.kinds) - (0 if _holds_all_averages(form) else len(state.further_averages))
    return kinds * (state.nbytes // len(state.kinds))


def _check_room(state: State, destination: Path, form: str, weights: str | None) -> None:
    needed = exported_bytes(state, form, weights)
    parent = next(p for p in destination.resolve().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < 1.01 * needed:
        raise ConversionError(
            f"{destination}: too little space, {needed:,} bytes needed, {free:,} free; choose another disk"
        )


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


def _write_ours(state: State, folder: Path, notes: list[str], progress: Progress | None) -> None:
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


def _description(state: State, weights: str | None) -> dict[str, Any]:
    """The description that `safe_files.description` reads."""
    content: dict[str, Any] = {"step": state.step, "config": to_dict(state.config)}
    if weights != MASTER and state.average and state.average.initial_share is not None:
        content["initial_share"] = state.average.initial_share
    if state.further_averages:
        content["ema_averages"] = average_metadata(list(state.averages.values()), state.updates)["ema_averages"]
    elif weights == AVERAGE and state.average and len(state.config.train.ema_decays) > 1:
        content["ema_decay"] = state.average.decay
    return content | ({"weights": weights} if weights else {"updates": state.updates})


def _weights(state: State, weights: str) -> dict[str, Entry]:
    if weights not in state.kinds:
        raise ConversionError(f"weights = {weights}: {state.where} has {', '.join(state.kinds)} only")
    entries = {name: _entry(state, state.read, weights, name) for name in state.shapes}
    return entries | {name: entry_of(t) for name, t in state.buffers.items() if name.startswith("blocks.")}


def _write_safetensors(state: State, file: Path, weights: str | None, progress: Progress | None) -> None:
    if weights:
        entries = _weights(state, weights)
    else:
        entries = {
            f"{kind}/{name}": _entry(state, state.read, kind, name) for kind in state.kinds for name in state.shapes
        }
        entries |= {f"buffer/{name}": entry_of(tensor) for name, tensor in state.buffers.items()}
    metadata = {"format": "pt", "megapromoe": json.dumps(_description(state, weights))}
    write_safetensors(file, entries, metadata, progress)


# ---- published


def _published_tree(state: State, notes: list[str]) -> dict[str, Any]:
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


def _write_deepspeed(state: State, root: Path, progress: Progress | None) -> None:
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
