"""Folders that diffusers opens as a `ProMoEPipeline` of `megapromoe.diffusers`.

    DIR/model_index.json                  the classes of the parts, names of the classes, guidance, steps
    DIR/transformer/config.json           `model.*`, and as `_megapromoe` the whole config, step and kind of weights
    DIR/transformer/*.safetensors         one file, or several with an index
    DIR/scheduler/scheduler_config.json   method, objective, shift
    DIR/vae/                              the autoencoder of the latents, if it is given

This module writes such a folder tensor by tensor, without diffusers, and finds the model in it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from megapromoe.checkpoint.tensor_writer import Entry, Progress, entry_of, write_safetensors
from megapromoe.config.options import SAMPLING_METHODS, Config, to_dict
from megapromoe.conversion.sharded import INDEX
from megapromoe.conversion.stream import ConversionError
from megapromoe.data.datasets import DatasetError, Digits
from megapromoe.data.fashion import FashionMNIST
from megapromoe.data.latents import read_manifest
from megapromoe.data.text_features import FOLDER, read_text_manifest
from megapromoe.io import sync, write_json

MODEL_INDEX = "model_index.json"
PIPELINE, TRANSFORMER, SCHEDULER = "ProMoEPipeline", "ProMoETransformer2DModel", "ProMoEScheduler"
MODULES = {TRANSFORMER: "megapromoe.diffusers.transformer", SCHEDULER: "megapromoe.diffusers.scheduler"}
"""Class -> module, as `DiffusionPipeline.save_pretrained` writes them."""
PREFIX = "dit."  # of our names: the transformer's DiT is its attribute `dit`
DESCRIPTION = "_megapromoe"  # diffusers keeps entries with an underscore when it saves a model again
STEM = "diffusion_pytorch_model"
SHARD_BYTES = 10_000_000_000  # as in diffusers
_LONGEST_JSON = 10_000_000  # bytes


@dataclass(frozen=True)
class FolderParts:
    """What a folder holds besides the state of a run.

    Attributes:
        shard_bytes: most bytes of weights in a file; a larger tensor has a file of its own.
        vae: the autoencoder, a model of diffusers; None: none.
        id2label: class -> name; None: as the data of the run names them.
    """

    shard_bytes: int = SHARD_BYTES
    vae: Any = None
    id2label: Mapping[int, str] | None = None


def model_folder(path: Path) -> Path:
    """The folder of the model in a folder of ours; `path` itself for others."""
    inner = Path(path) / "transformer"
    return inner if is_pipeline(path) and (inner / "config.json").is_file() else Path(path)


def is_pipeline(path: Path) -> bool:
    """Whether a folder holds a `ProMoEPipeline`."""
    return _read_json(Path(path) / MODEL_INDEX).get("_class_name") == PIPELINE


def options_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The options `model.*` in the config.json of a `ProMoETransformer2DModel`, without what diffusers adds."""
    added = ("quantization_config", "auto_map")
    return {name: value for name, value in content.items() if not name.startswith("_") and name not in added}


def is_transformer(content: Any) -> bool:
    """Whether a config.json is that of a `ProMoETransformer2DModel`."""
    return isinstance(content, Mapping) and content.get("_class_name") == TRANSFORMER


def _read_json(path: Path) -> Mapping[str, Any]:
    """A small JSON object; empty if there is none."""
    try:
        if not path.is_file() or path.stat().st_size > _LONGEST_JSON:
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, Mapping) else {}


def scheduler_settings(objective: str, shift: float) -> dict[str, Any]:
    """What other schedulers of diffusers need to know of a model, so that they can take the place of ours.

    Args:
        objective: a value of `diffusion.objective`.
        shift: of the noise levels.
    """
    settings: dict[str, Any] = {"num_train_timesteps": 1000}
    if objective == "rf":
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift, "shift": shift}
        return settings | flow
    betas = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    return settings | betas | {"prediction_type": "epsilon", "clip_sample": False, "timestep_spacing": "linspace"}


def check_folder(config: Config, parts: FolderParts) -> None:
    """Raises ConversionError unless a pipeline of diffusers can hold a run and the given parts."""
    if config.model.has_custom_router:
        raise ConversionError(
            f"model.router = {config.model.router!r}: is code of yours, and diffusers opens a folder without executing"
            " any; use another format, such as safetensors"
        )
    if parts.id2label is None:
        return
    if config.model.has_text:
        raise ConversionError("--id2label: the run has model.condition = 'text' and no classes; leave it out")
    check_labels(parts.id2label, config.model.num_classes, "--id2label")


def check_labels(id2label: Mapping[int, str], num_classes: int, source: str) -> None:
    """Raises ConversionError unless these are names of classes of a model."""
    if wrong := [label for label in id2label if not 0 <= label < num_classes]:
        raise ConversionError(f"{source}: names class {wrong[0]}, the model has classes 0..{num_classes - 1}")


def read_labels(path: Path) -> dict[int, str]:
    """The names of classes in a JSON file: {"0": "name"}, or a list. Raises ConversionError."""
    form = f'{path}: must be a JSON object such as {{"0": "name"}}, or a list of names'
    try:
        if path.stat().st_size > _LONGEST_JSON:
            raise ConversionError(f"{form}; it has more than {_LONGEST_JSON:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ConversionError(f"{path}: {problem.strerror}; give a JSON file with names of classes") from problem
    except (ValueError, RecursionError) as problem:
        raise ConversionError(f"{form} ({problem})") from problem
    if isinstance(content, list):
        content = dict(enumerate(content))
    if not isinstance(content, dict) or not content:
        raise ConversionError(form)
    for label, name in content.items():
        if not isinstance(name, str) or not name.strip() or not str(label).isdecimal():
            raise ConversionError(f"{form}; it has {label!r}: {name!r}")
    return {int(label): name for label, name in content.items()}


def write_folder(
    config: Config,
    entries: Mapping[str, Entry],
    description: Mapping[str, Any],
    folder: Path,
    parts: FolderParts,
    progress: Progress | None = None,
) -> list[str]:
    """Writes the folder of a run; returns notes for the user.

    Args:
        config: of the run.
        entries: our name -> parameter or buffer.
        description: what `safe_files.description` reads.
        folder: does not exist.
        parts: what else the folder holds.
        progress: called with the number of bytes of each tensor.
    """
    notes: list[str] = []
    model, scheduler = folder / "transformer", folder / "scheduler"
    for path in (folder, model, scheduler):
        path.mkdir()
    _write_weights(model, {f"{PREFIX}{name}": entry for name, entry in entries.items()}, parts.shard_bytes, progress)
    _write_config(model / "config.json", TRANSFORMER, to_dict(config)["model"] | {DESCRIPTION: dict(description)})
    method, d = config.sample.method, config.diffusion
    if method not in SAMPLING_METHODS:
        replacement = "euler" if d.objective == "rf" else "ddim"
        notes.append(f"sample.method = {method!r} is code, which the folder does not hold: it has {replacement}")
        method = replacement
    settings = {
        "method": method,
        "objective": d.objective,
        **scheduler_settings(d.objective, config.time_shift),
        "shift": config.time_shift,
    }
    _write_config(scheduler / "scheduler_config.json", SCHEDULER, settings)
    if parts.vae is not None:
        parts.vae.save_config(folder / "vae")
        weights = {name: entry_of(tensor) for name, tensor in parts.vae.state_dict().items()}
        write_safetensors(folder / "vae" / f"{STEM}.safetensors", weights, {"format": "pt"})
    _write_config(folder / MODEL_INDEX, PIPELINE, _model_index(config, parts, notes))
    for path in (*folder.rglob("*"), folder):
        sync(path)
    return notes


def _model_index(config: Config, parts: FolderParts, notes: list[str]) -> dict[str, Any]:
    """The content of model_index.json; no values are lists but the parts, because diffusers takes them for parts."""
    s = config.sample
    index: dict[str, Any] = {
        "transformer": [MODULES[TRANSFORMER], TRANSFORMER],
        "scheduler": [MODULES[SCHEDULER], SCHEDULER],
        "vae": [None, None] if parts.vae is None else ["diffusers", type(parts.vae).__name__],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "guidance_scale": float(s.guidance),
        "guidance_low": float(s.guidance_low),
        "guidance_high": float(s.guidance_high),
        "num_inference_steps": s.steps,
        "id2label": None,
        "encoder_identity": None,
    }
    if config.model.has_text:
        return index | {"encoder_identity": _encoder_identity(config, notes)}
    names = parts.id2label if parts.id2label is not None else _class_names(config, notes)
    return index | {"id2label": {str(label): name for label, name in sorted(names.items())} or None}


def _class_names(config: Config, notes: list[str]) -> dict[int, str]:
    """The names of the classes as the data of the run has them; empty if it has none."""
    source = config.data.source
    names: tuple[str, ...] = ()
    if source == "latents":
        try:
            names = read_manifest(Path(config.data.path)).class_names
        except DatasetError as error:
            notes.append(f"the folder has no names of classes ({error}); give them with --id2label FILE")
    elif source in ("digits", "fashion_mnist"):
        names = Digits.class_names if source == "digits" else FashionMNIST.class_names
    return dict(enumerate(names)) if len(names) == config.model.num_classes else {}


def _encoder_identity(config: Config, notes: list[str]) -> dict[str, Any] | None:
    """What prompts must be encoded with: identity of the encoder, stored type of features, tokens of the longest text.

    None if the captions of the run cannot be read.
    """
    if config.data.source == "latents":
        try:
            manifest = read_text_manifest(Path(config.data.path) / FOLDER)
            return {**manifest.encoder, "rounded_to": manifest.dtype, "max_tokens": manifest.max_tokens}
        except DatasetError as error:
            notes.append(
                f"the folder does not name the text encoder of its prompts, which is then not checked ({error})"
            )
    return None


def _write_config(path: Path, class_name: str, content: Mapping[str, Any]) -> None:
    head = {"_class_name": class_name}
    with contextlib.suppress(metadata.PackageNotFoundError):  # diffusers opens the folder without the version too
        head["_diffusers_version"] = metadata.version("diffusers")
    write_json(path, {**head, **content}, indent=2)


def _write_weights(folder: Path, entries: Mapping[str, Entry], most: int, progress: Progress | None) -> None:
    """Writes one file, or several with an index, as diffusers names them."""
    shards: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.nbytes
    kind = {"format": "pt"}
    if len(shards) == 1:
        write_safetensors(folder / f"{STEM}.safetensors", entries, kind, progress)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, kind, progress)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(entry.nbytes for entry in entries.values())
    write_json(folder / f"{STEM}{INDEX}", {"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
