"""Checkpoints of every format, opened as one thing: a `State` in our logical names, read tensor by tensor.

==============  ==================================================================================================
ours            a run directory, or one of its checkpoints/step-XXXXXXXX
published       a .pth of the ProMoE release: step, model_state_dict, ema_model_state_dict, optimizer_state_dict;
                and what else torch.save wrote: see `containers`
safetensors     one file, or several and their index; all state as KIND/NAME, or weights alone as NAME; the config in
                its metadata
diffusers       a folder of config.json and weights alone, of ours or of diffusers' DiTTransformer2DModel
deepspeed       latest and global_stepN/ with mp_rank_*, layer_*_expert_*, expp_rank_* and zero_pp_rank_* files
==============  ==================================================================================================
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from megapromoe.checkpoint.average import Average
from megapromoe.checkpoint.format import KINDS, Checkpoint, check_model
from megapromoe.checkpoint.latest import read_latest
from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.checkpoint.snapshots import choose_weights
from megapromoe.checkpoint.step_folders import steps_in
from megapromoe.config.options import Config
from megapromoe.conversion.foreign import deepspeed_folder, open_deepspeed
from megapromoe.conversion.published import open_published
from megapromoe.conversion.safe_files import DIFFUSERS_FILE, description, open_safetensors, read_weights, weights_file
from megapromoe.conversion.sharded import INDEX, is_index
from megapromoe.conversion.state import State, config_from, model_shapes, needed
from megapromoe.conversion.stream import ConversionError, Stored, read_safetensors
from megapromoe.conversion.torch_files import read_pickle

FORMATS = ("ours", "published", "safetensors", "diffusers", "deepspeed")

T = TypeVar("T")


def detect(path: Path) -> str:
    """The format of what lies at `path`. Raises ConversionError if there is nothing, or nothing known."""
    path = Path(path)
    if path.is_file():
        if path.suffix == ".safetensors" or is_index(path):
            return "safetensors"
        if path.suffix in (".pth", ".pt", ".ckpt", ".bin") or zipfile.is_zipfile(path):
            return "published"
    elif path.is_dir():
        if (path / "manifest.json").is_file() or (path / "config.yaml").is_file():
            return "ours"
        if weights_file(path):
            return "diffusers"
        if (path / "model_index.json").is_file():
            raise ConversionError(f"{path}: is a pipeline of diffusers; give its model, {path / 'transformer'}")
        if (path / "latest").is_file() or list(path.glob("*mp_rank_*_model_states.pt")):
            return "deepspeed"
    else:
        raise ConversionError(f"{path}: there is no such file or folder")
    raise ConversionError(
        f"{path}: is no checkpoint of a known format: a run directory or step folder of ours, a published .pth,"
        f" .safetensors or its index (*{INDEX}), a folder with {DIFFUSERS_FILE}, or one of DeepSpeed with"
        " mp_rank_* files"
    )


def open_state(
    path: Path,
    form: str = "auto",
    config: Config | None = None,
    step: int | None = None,
    objective: str | None = None,
) -> State:
    """Opens a checkpoint; of its tensors only buffers are read.

    Args:
        form: one of FORMATS, or "auto".
        config: of the run; goes before what the checkpoint says of itself. A published .pth says nothing.
        step: which of several, in a run directory or a DeepSpeed folder; None takes the latest.
        objective: one of `conventions.OBJECTIVES`, of a checkpoint that does not say what it was trained to predict.

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
        if objective:
            raise ConversionError(f"--objective {objective}: {path} says itself what it was trained for; leave it out")
        return _open_ours(path, config, step)
    if form == "deepspeed":
        return open_deepspeed(path, config, step, objective)
    if form == "published":
        return open_published(path, config, objective)
    return open_safetensors(path, form, config, objective)


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
        tensors, metadata = read_weights(path)
        said = description(path, metadata, form)
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
    run = RunDirectory(path)
    full = step is None or step in steps_in(run.checkpoints)
    return _Streamed(choose_weights(run.checkpoints, step, "master" if full else "ema"))


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
        int(manifest["updates"]) if checkpoint.kinds == KINDS else 0,
        checkpoint.kinds,
        shapes,
        {name: checkpoint.buffer(name) for name in names},
        checkpoint.logical,
        layout=f"{len(manifest['ranks'])} rank files, {parts} parts",
        converted="run" not in manifest,  # training gives each checkpoint the identity of its run
        average=Average.of(manifest),
    )
