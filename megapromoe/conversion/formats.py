"""Checkpoints of every format, opened as one thing: a `State` in our logical names, read tensor by tensor.

==============  ==================================================================================================
ours            a run directory, or one of its checkpoints/step-XXXXXXXX
published       a .pth of the ProMoE release: step, model_state_dict, ema_model_state_dict, optimizer_state_dict
safetensors     one file; all state as KIND/NAME, or weights alone as NAME; the config in its metadata
diffusers       config.json and diffusion_pytorch_model.safetensors: weights alone
deepspeed       latest and global_stepN/ with mp_rank_*, layer_*_expert_* and expp_rank_* files
==============  ==================================================================================================
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from megapromoe.checkpoint.format import KINDS, Checkpoint, check_model
from megapromoe.checkpoint.latest import read_latest
from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.checkpoint.step_folders import choose_checkpoint
from megapromoe.config.options import Config
from megapromoe.conversion.foreign import deepspeed_folder, open_deepspeed, open_published
from megapromoe.conversion.state import State, check_same, config_from, model_shapes, needed, reader
from megapromoe.conversion.stream import ConversionError, Stored, read_safetensors
from megapromoe.conversion.torch_files import read_pickle

FORMATS = ("ours", "published", "safetensors", "diffusers", "deepspeed")
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"

T = TypeVar("T")


def detect(path: Path) -> str:
    """The format of what lies at `path`. Raises ConversionError if there is nothing, or nothing known."""
    path = Path(path)
    if path.is_file():
        if path.suffix == ".safetensors":
            return "safetensors"
        if path.suffix in (".pth", ".pt", ".ckpt", ".bin") or zipfile.is_zipfile(path):
            return "published"
    elif path.is_dir():
        if (path / "manifest.json").is_file() or (path / "config.yaml").is_file():
            return "ours"
        if (path / DIFFUSERS_FILE).is_file():
            return "diffusers"
        if (path / "latest").is_file() or list(path.glob("*mp_rank_*_model_states.pt")):
            return "deepspeed"
    else:
        raise ConversionError(f"{path}: there is no such file or folder")
    raise ConversionError(
        f"{path}: is no checkpoint of a known format: a run directory or step folder of ours, a published .pth,"
        f" .safetensors, a folder with {DIFFUSERS_FILE}, or one of DeepSpeed with mp_rank_* files"
    )


def open_state(path: Path, form: str = "auto", config: Config | None = None, step: int | None = None) -> State:
    """Opens a checkpoint; of its tensors only buffers are read.

    Args:
        form: one of FORMATS, or "auto".
        config: of the run; goes before what the checkpoint says of itself. A published .pth says nothing.
        step: which of several, in a run directory or a DeepSpeed folder; None takes the latest.

    Raises ConversionError, CheckpointError or ConfigError, each saying what is wrong and what to do.
    """
    path = Path(path)
    found = detect(path)
    form = found if form == "auto" else form
    if form != found:
        raise ConversionError(f"{path}: was said to be {form}, but is {found}")
    if step is not None and form not in ("ours", "deepspeed"):
        raise ConversionError(f"step = {step}: {path} holds a single state; leave the step out")
    if form == "ours":
        return _open_ours(path, config, step)
    if form == "deepspeed":
        return open_deepspeed(path, config, step)
    if form == "published":
        return open_published(path, config)
    file = path / DIFFUSERS_FILE if form == "diffusers" else path
    return _open_safetensors(path, file, config, form)


def with_latest(path: Path, step: int | None, use: Callable[[int | None], T]) -> T:
    """`use(step)`; without a step, of a run directory, with that of its newest checkpoint.

    A state is read as it is used, so that a live run may remove its checkpoint meanwhile; then `use` is called again
    with what is newest then. See `read_latest`.
    """
    path = Path(path)
    if step is None and (path / "config.yaml").is_file() and not (path / "manifest.json").is_file():
        return read_latest(RunDirectory(path).checkpoints, None, use)
    return use(step)


def list_tensors(path: Path, step: int | None = None) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Facts, and tensors by their name in the files, of a checkpoint of any format; no config needed, none is read."""
    path, form = Path(path), detect(path)
    facts: dict[str, Any] = {"format": form}
    if form == "ours":
        checkpoint = _checkpoint(path, step)
        facts |= {k: v for k, v in checkpoint.manifest.items() if k in ("step", "updates", "versions")}
        files = {one["file"]: checkpoint.folder / one["file"] for one in checkpoint.manifest["ranks"]}
        tensors = {
            f"{short}: {name}" if len(files) > 1 else name: one
            for short, file in files.items()
            for name, one in read_safetensors(file)[0].items()
        }
        return facts | {"files": len(files), "config": "in the manifest"}, tensors
    if form in ("safetensors", "diffusers"):
        file = path / DIFFUSERS_FILE if form == "diffusers" else path
        tensors, metadata = read_safetensors(file)
        said = _said(path, file, metadata, form)
        facts |= {k: said[k] for k in ("step", "updates", "weights") if k in said}
        return facts | {"config": "included" if "config" in said else "none"}, tensors
    if form == "published":
        tree = read_pickle(path)
        facts |= {"step": tree["step"]} if isinstance(tree, dict) and "step" in tree else {}
        return facts | {"config": "none"}, dict(_leaves(tree))
    folder = deepspeed_folder(path, step)
    tensors = {f"{file.name}: {n}": t for file in sorted(folder.glob("*.pt")) for n, t in _leaves(read_pickle(file))}
    return facts | {"tag": folder.name}, tensors


def _leaves(tree: Any, name: str = "") -> Iterable[tuple[str, Stored]]:
    if isinstance(tree, Stored):
        yield name, tree
    elif isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{name}.{key}" if name else str(key))


# ---- ours


class _Streamed(Checkpoint):
    """A checkpoint whose files are read tensor by tensor, not mapped: mapped bytes count as memory."""

    def _file(self, name: str):
        if name not in self._open:
            self._open[name] = _Tensors(read_safetensors(self.folder / name)[0])
        return self._open[name]


class _Tensors:
    def __init__(self, tensors: dict[str, Stored]):
        self.tensors = tensors

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name].read()


def _checkpoint(path: Path, step: int | None) -> _Streamed:
    if (path / "manifest.json").is_file():
        checkpoint = _Streamed(path)
        if step not in (None, checkpoint.manifest["step"]):
            raise ConversionError(f"step = {step}: {path} is of step {checkpoint.manifest['step']}; leave the step out")
        return checkpoint
    return _Streamed(choose_checkpoint(RunDirectory(path).checkpoints, step))


def _open_ours(path: Path, config: Config | None, step: int | None) -> State:
    checkpoint = _checkpoint(path, step)
    checkpoint.verify()
    manifest = checkpoint.manifest
    config = needed(config or (config_from(manifest["config"]) if "config" in manifest else None), path)
    shapes, _ = model_shapes(config.model)
    check_model(checkpoint, shapes)
    names = [name.removeprefix("buffer/") for name in manifest.get("buffers", [])]
    parts = sum(len(one["parts"]) for one in manifest["ranks"])
    return State(
        checkpoint.folder,
        "ours",
        config,
        int(manifest["step"]),
        int(manifest["updates"]),
        KINDS,
        shapes,
        {name: checkpoint.buffer(name) for name in names},
        checkpoint.logical,
        layout=f"{len(manifest['ranks'])} rank files, {parts} parts",
    )


# ---- safetensors, diffusers


def _said(path: Path, file: Path, metadata: Mapping[str, str], form: str) -> dict[str, Any]:
    """What a safetensors file or a diffusers folder says of itself: config, step, updates, weights."""
    try:
        if form == "safetensors":
            said = json.loads(metadata.get("megapromoe", "{}"))
        else:
            said = json.loads((path / "config.json").read_text(encoding="utf-8")).get("megapromoe", {})
    except OSError as problem:
        raise ConversionError(f"{path / 'config.json'}: {problem.strerror}") from problem
    except (ValueError, AttributeError, RecursionError) as problem:
        raise ConversionError(f"{path}: its description is not the JSON that it should be ({problem})") from problem
    if not isinstance(said, dict) or any(type(said.get(key, 0)) is not int for key in ("step", "updates")):
        raise ConversionError(
            f"{path}: its description is not the JSON that it should be (step and updates: whole numbers)"
        )
    return said


def _open_safetensors(path: Path, file: Path, config: Config | None, form: str) -> State:
    tensors, metadata = read_safetensors(file)
    said = _said(path, file, metadata, form)
    config = config or (config_from(said["config"]) if "config" in said else None)
    config = needed(config, path)
    shapes, buffer_shapes = model_shapes(config.model)
    kinds = tuple(kind for kind in KINDS if any(name.startswith(f"{kind}/") for name in tensors))
    notes: list[str] = []
    if kinds:
        pieces = {(kind, name): tensors.get(f"{kind}/{name}") for kind in kinds for name in shapes}
        expected = {f"{kind}/{name}": shape for kind in kinds for name, shape in shapes.items()}
        expected |= {f"buffer/{name}": shape for name, shape in buffer_shapes.items()}
        buffers = {n.removeprefix("buffer/"): t for n, t in tensors.items() if n.startswith("buffer/")}
        extra = {f"buffer/{name}" for name in buffers if name == "pos_embed" or name.startswith("ema.")}
    else:
        kinds, extra = ("master", "ema"), {"pos_embed"} & set(tensors)
        notes.append("it holds weights alone, which stand for the masters and for their average")
        pieces = {(kind, name): tensors.get(name) for kind in kinds for name in shapes}
        expected = {**shapes, **buffer_shapes}
        buffers = {name: t for name, t in tensors.items() if name in buffer_shapes or name in extra}
    check_same(path, {n: t.shape for n, t in tensors.items() if n not in extra}, expected)
    step = int(said.get("step", 0))
    return State(
        path,
        form,
        config,
        step,
        int(said.get("updates", 0)) if "exp_avg" in kinds else 0,
        kinds,
        shapes,
        {name: stored.read() for name, stored in buffers.items()},
        reader(pieces, shapes),
        layout="1 file",
        notes=notes,
    )
