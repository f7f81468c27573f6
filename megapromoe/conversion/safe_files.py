"""Opens safetensors: a file, several files with an index, and folders of ours or of diffusers with a config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapromoe.checkpoint.average import Average, kinds_of_averages
from megapromoe.checkpoint.format import all_kinds
from megapromoe.checkpoint.manifest import average_problems
from megapromoe.checkpoint.weights import AVERAGE
from megapromoe.config.options import Config
from megapromoe.conversion import diffusers_dit, diffusers_folder
from megapromoe.conversion.containers import check_tensors
from megapromoe.conversion.conventions import assumed_objective, in_our_sign, with_objective
from megapromoe.conversion.sharded import INDEX, files_of, is_index, read_tensors
from megapromoe.conversion.starting_run import StartingRun
from megapromoe.conversion.state import (
    State,
    check_floats,
    check_positions,
    check_same,
    model_shapes,
    needed,
    reader,
    stored_config,
)
from megapromoe.conversion.stream import ConversionError, Stored
from megapromoe.conversion.torch_files import read_pickle

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
_STEM = DIFFUSERS_FILE.removesuffix(".safetensors")
_WEIGHTS = (
    DIFFUSERS_FILE,
    f"{_STEM}{INDEX}",
    f"{_STEM}.fp16.safetensors",
    "model.safetensors",
    f"model{INDEX}",
    f"{_STEM}.bin",
)
_LONGEST_CONFIG = 10_000_000  # bytes of a config.json


def weights_file(path: Path) -> Path | None:
    """The file of weights in a folder, or their index; None if there is none, or `path` is not a folder.

    Of a pipeline of ours it is that of its model.
    """
    folder = diffusers_folder.model_folder(path)
    return next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)


def read_weights(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors (not read yet) and the metadata of the weights in a folder, or of a safetensors file or its index."""
    file = weights_file(path) or path
    if file.suffix == ".bin":  # a torch.save file of an older version of diffusers
        return dict(check_tensors(file, "content", read_pickle(file))), {}
    return read_tensors(file)


def description(path: Path, metadata: Mapping[str, str], form: str) -> dict[str, Any]:
    """The description that megapromoe stores in a safetensors file or folder: config, step, updates, weights.

    It is empty for files of other programs. Raises ConversionError if it is malformed.
    """
    try:
        if form == "safetensors":
            stored = json.loads(metadata.get("megapromoe", "{}"))
        else:
            content = _config_json(path)
            stored = content.get(diffusers_folder.DESCRIPTION, content.get("megapromoe", {}))
    except (ValueError, AttributeError, RecursionError) as problem:
        raise ConversionError(f"{path}: its description is not valid JSON ({problem})") from problem
    if not isinstance(stored, dict) or any(type(stored.get(key, 0)) is not int for key in ("step", "updates")):
        raise ConversionError(f"{path}: its description is not valid (step and updates must be whole numbers)")
    share = stored.get("initial_share", 0.0)
    if type(share) not in (int, float) or not 0 <= share <= 1:
        raise ConversionError(f"{path}: its description is not valid (initial_share must be a number from 0 to 1)")
    decay = stored.get("ema_decay", 0.0)
    if type(decay) not in (int, float) or not 0 <= decay < 1:
        raise ConversionError(f"{path}: its description is not valid (ema_decay must be a number from 0 to below 1)")
    if wrong := next(average_problems(stored.get("ema_averages")), None):
        raise ConversionError(f"{path}: its description is not valid ({wrong})")
    return stored


def _config_json(path: Path) -> Any:
    file = diffusers_folder.model_folder(path) / "config.json"
    try:
        if file.exists() and file.stat().st_size > _LONGEST_CONFIG:
            raise ConversionError(f"{file}: has more than {_LONGEST_CONFIG:,} bytes and is not the config of a model")
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ConversionError(f"{file}: {problem.strerror}") from problem


def open_safetensors(
    path: Path, form: str, config: Config | None, objective: str | None, run: StartingRun | None = None
) -> State:
    """Opens a safetensors file or folder; see `formats.open_state`. `form` is "safetensors" or "diffusers"."""
    file = weights_file(path) or path
    tensors, metadata = read_weights(path)
    stored_description = description(path, metadata, form)
    if stored_description and objective:
        raise ConversionError(f"--objective {objective}: {path} contains its objective; leave --objective out")
    content = _config_json(path) if form == "diffusers" else {}
    is_ours = bool(stored_description) or diffusers_folder.is_transformer(content)
    if diffusers_folder.is_transformer(content):
        tensors = {name.removeprefix(diffusers_folder.PREFIX): stored for name, stored in tensors.items()}
        config = config or _config_of_transformer(path, content, stored_description, run)
    elif form == "diffusers" and (native := diffusers_dit.native(path, content)):
        if config is None and run is not None:
            config = diffusers_dit.config_for_run(path, native, run)
        return _open_native(path, native, tensors, config, objective)
    config = config or (stored_config(stored_description["config"], run) if "config" in stored_description else None)
    config = needed(config, path, run, {name: stored.shape for name, stored in tensors.items()})
    notes: list[str] = []
    if objective:
        config = with_objective(config, objective)
    elif not stored_description:
        notes.append(assumed_objective(config, run is not None))
    shapes, buffer_shapes = model_shapes(config.model)
    averages = _averages(stored_description)
    kinds = tuple(kind for kind in all_kinds(averages) if any(name.startswith(f"{kind}/") for name in tensors))
    prefix = "buffer/" if kinds else ""
    tables = {name for name in tensors if name in (f"{prefix}pos_embed", f"{prefix}ema.pos_embed")}
    if kinds:
        parameters = {f"{kind}/{name}": shape for kind in kinds for name, shape in shapes.items()}
        pieces: dict[tuple[str, str], Any] = {(k, n): tensors.get(f"{k}/{n}") for k in kinds for n in shapes}
        extra = {name for name in tensors if name.startswith("buffer/ema.")} | tables
    else:
        kinds, extra = ("master", "ema"), tables
        notes.append("it holds one set of weights, which is used for the masters and for their average")
        parameters = dict(shapes)
        pieces = {(kind, name): tensors.get(name) for kind in kinds for name in shapes}
    expected = parameters | {f"{prefix}{name}": shape for name, shape in buffer_shapes.items()}
    check_same(path, {n: t.shape for n, t in tensors.items() if n not in extra}, expected)
    notes += check_floats(path, {name: tensors[name] for name in parameters})
    buffers = {}
    for name in (*(f"{prefix}{n}" for n in buffer_shapes), *extra):
        if name not in tables:
            buffers[name.removeprefix(prefix)] = tensors[name].read()
        elif (value := check_positions(path, name, tensors[name], config.model)) is not None:
            buffers[name.removeprefix(prefix)] = value
    read = reader(pieces, shapes)
    return State(
        path,
        form,
        config,
        int(stored_description.get("step", 0)),
        int(stored_description.get("updates", 0)) if "exp_avg" in kinds else 0,
        kinds,
        shapes,
        buffers,
        read if is_ours else in_our_sign(read, config),
        layout=_layout(file),
        notes=notes,
        average=averages[AVERAGE],
        further_averages={kind: average for kind, average in averages.items() if kind != AVERAGE},
    )


def _config_of_transformer(
    path: Path, content: Mapping[str, Any], stored: Mapping[str, Any], run: StartingRun | None
) -> Config:
    """The config of a `ProMoETransformer2DModel`: that of its run, or one with its model if it was made without a run.

    Raises ConversionError if both are there and their models differ.
    """
    model = diffusers_folder.options_of(content)
    if "config" not in stored:
        return stored_config({"model": model}, run)
    config = stored_config(stored["config"], run)
    for name, value in model.items():
        if value != getattr(config.model, name, None):
            raise ConversionError(
                f"{path}: config.json has {name} = {value!r}, but {getattr(config.model, name, None)!r} in its"
                f" {diffusers_folder.DESCRIPTION}; restore the file, or remove its {diffusers_folder.DESCRIPTION}"
            )
    return config


def _averages(stored: Mapping[str, Any]) -> dict[str, Average]:
    """The averages of a file by kind, from its description; the first one is `ema`."""
    if entries := stored.get("ema_averages"):
        return kinds_of_averages({"ema_averages": entries})
    updates = int(stored.get("updates", stored.get("step", 0)))
    return {AVERAGE: Average(None, stored.get("initial_share"), updates, stored.get("ema_decay"))}


def _open_native(
    path: Path, content: Mapping[str, Any], tensors: Mapping[str, Stored], given: Config | None, objective: str | None
) -> State:
    """Opens a folder of diffusers' own DiT."""
    notes = ["it holds one set of weights, which is used for the masters and for their average"]
    config = diffusers_dit.config_of(path, content, given, notes)
    if objective is None and given is None:
        if not config.model.learn_sigma:
            raise ConversionError(
                f"{path}: does not predict a variance, which our DDPM requires; give --objective rf, repa or sit"
            )
        objective = "ddpm"
        notes.append("diffusers' DiT pipeline uses DDPM: --objective ddpm is assumed; give --objective for another")
    if objective:
        config = with_objective(config, objective)
    check_positions(path, diffusers_dit.POSITIONS, tensors.get(diffusers_dit.POSITIONS), config.model)
    notes += check_floats(path, tensors)
    ours = diffusers_dit.our_names(path, tensors, config)
    shapes, _ = model_shapes(config.model)
    pieces = {(kind, name): ours[name] for kind in ("master", "ema") for name in shapes}
    read = in_our_sign(reader(pieces, shapes), config)
    layout = _layout(weights_file(path) or path)
    return State(path, "diffusers", config, 0, 0, ("master", "ema"), shapes, {}, read, layout, notes)


def _layout(file: Path) -> str:
    count = len(files_of(file)) if is_index(file) else 1
    return "1 file" if count == 1 else f"{count} files"
