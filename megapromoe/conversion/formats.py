"""Opens checkpoints of every format as a `State`, with our logical names, which is read tensor by tensor.

==============  ==================================================================================================
ours            a run directory, or one of its checkpoints/step-XXXXXXXX
published       a .pth of the ProMoE release: step, model_state_dict, ema_model_state_dict, optimizer_state_dict;
                or another torch.save file: see `containers`
safetensors     one file, or several with an index; the full state as KIND/NAME, or weights as NAME; the config in
                its metadata
diffusers       a pipeline of ours (`diffusers_folder`) or its model, or a folder of diffusers' DiTTransformer2DModel
deepspeed       latest and global_stepN/ with mp_rank_*, layer_*_expert_*, expp_rank_* and zero_pp_rank_* files
==============  ==================================================================================================
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from megapromoe.checkpoint.format import KINDS, MOMENTS, MOMENTUM, Checkpoint, check_model
from megapromoe.checkpoint.latest import read_latest
from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.checkpoint.snapshots import choose_weights
from megapromoe.checkpoint.step_folders import steps_in
from megapromoe.checkpoint.weights import AVERAGE, MASTER
from megapromoe.config.options import Config
from megapromoe.conversion.diffusers_folder import MODEL_INDEX, is_pipeline
from megapromoe.conversion.foreign import deepspeed_folder, open_deepspeed
from megapromoe.conversion.published import open_published
from megapromoe.conversion.safe_files import DIFFUSERS_FILE, description, open_safetensors, read_weights, weights_file
from megapromoe.conversion.sharded import INDEX, is_index
from megapromoe.conversion.starting_run import StartingRun
from megapromoe.conversion.state import State, model_shapes, needed, stored_config
from megapromoe.conversion.stream import ConversionError, Stored, read_safetensors
from megapromoe.conversion.torch_files import read_pickle

FORMATS = ("ours", "published", "safetensors", "diffusers", "deepspeed")
MUON_NOTE = "its optimizer was Muon, whose state is not converted: moments start at zero"

T = TypeVar("T")


def detect(path: Path) -> str:
    """The format of the checkpoint at `path`. Raises ConversionError if there is none, or its format is unknown."""
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
        if is_pipeline(path):
            raise ConversionError(f"{path / 'transformer'}: has no weights ({DIFFUSERS_FILE}); restore the folder")
        if (path / MODEL_INDEX).is_file():
            raise ConversionError(f"{path}: is a pipeline of diffusers; give its model, {path / 'transformer'}")
        if (path / "latest").is_file() or list(path.glob("*mp_rank_*_model_states.pt")):
            return "deepspeed"
    else:
        raise ConversionError(f"{path}: there is no such file or folder")
    raise ConversionError(
        f"{path}: is not a checkpoint of a known format: a run directory or step folder of ours, a published .pth,"
        f" .safetensors or its index (*{INDEX}), a folder with {DIFFUSERS_FILE}, or a DeepSpeed folder with"
        " mp_rank_* files"
    )


def open_state(
    path: Path,
    form: str = "auto",
    config: Config | None = None,
    step: int | None = None,
    objective: str | None = None,
    run: StartingRun | None = None,
    share: tuple[int, int] = (0, 1),
) -> State:
    """Opens a checkpoint. Of its tensors, only buffers are read at once.

    Args:
        path: file or folder.
        form: one of FORMATS, or "auto".
        config: of the run; used in place of the config in the checkpoint. A published .pth contains none.
        step: which checkpoint of a run directory or a DeepSpeed folder; None: the latest.
        objective: one of `conventions.OBJECTIVES`, for a checkpoint that does not contain its objective.
        run: a run that starts from the checkpoint; what the checkpoint does not contain follows from its config.
        share: (rank, ranks) of a job whose ranks open the same checkpoint: each verifies its share of the hashes.

    Raises ConversionError, CheckpointError or ConfigError.
    """
    path = Path(path)
    actual = detect(path)
    form = actual if form == "auto" else form
    if form != actual:
        raise ConversionError(
            f"{path}: the given format is {form}, but the checkpoint is {actual}; leave the format out"
        )
    if step is not None and form not in ("ours", "deepspeed"):
        raise ConversionError(f"step = {step}: {path} holds a single state; leave the step out")
    if form == "ours":
        if objective:
            raise ConversionError(f"--objective {objective}: {path} contains its objective; leave --objective out")
        return _open_ours(path, config, step, run, share)
    if form == "deepspeed":
        return open_deepspeed(path, config, step, objective, run)
    if form == "published":
        return open_published(path, config, objective, run)
    return open_safetensors(path, form, config, objective, run)


def with_latest(path: Path, step: int | None, use: Callable[[int | None], T]) -> T:
    """Returns `use(step)`; for a run directory without a given step, with the step of its newest checkpoint.

    A state is read while it is used, and a running training may remove its checkpoint during that time. `use` is then
    called again with the newest checkpoint. See `read_latest`.
    """
    path = Path(path)
    if step is None and (path / "config.yaml").is_file() and not (path / "manifest.json").is_file():
        return read_latest(RunDirectory(path).checkpoints, None, use)
    return use(step)


def list_tensors(path: Path, step: int | None = None) -> tuple[dict[str, Any], dict[str, Stored]]:
    """A summary of a checkpoint of any format, and its tensors by their names in the files; needs no config."""
    path, form = Path(path), detect(path)
    facts: dict[str, Any] = {"format": form}
    if form == "ours":
        checkpoint = _checkpoint(path, step)
        facts |= {k: v for k, v in checkpoint.manifest.items() if k in ("step", "updates", "versions")}
        files = {rank["file"]: checkpoint.folder / rank["file"] for rank in checkpoint.manifest["ranks"]}
        tensors = {
            f"{short}: {name}" if len(files) > 1 else name: stored
            for short, file in files.items()
            for name, stored in read_safetensors(file)[0].items()
        }
        return facts | {"files": len(files), "config": "in the manifest"}, tensors
    if form in ("safetensors", "diffusers"):
        tensors, metadata = read_weights(path)
        stored_description = description(path, metadata, form)
        facts |= {k: stored_description[k] for k in ("step", "updates", "weights") if k in stored_description}
        return facts | {"config": "included" if "config" in stored_description else "none"}, tensors
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
    """A checkpoint whose files are read tensor by tensor and not memory-mapped: mapped bytes count as used memory."""

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
    return _Streamed(choose_weights(run.checkpoints, step, MASTER if full else AVERAGE))


def _open_ours(
    path: Path, config: Config | None, step: int | None, run: StartingRun | None, share: tuple[int, int]
) -> State:
    checkpoint = _checkpoint(path, step)
    checkpoint.verify(*share)
    manifest = checkpoint.manifest
    stored = stored_config(manifest["config"], run) if config is None and "config" in manifest else None
    shapes_in_file = {name: tuple(shape) for name, shape in checkpoint.shapes.items()}
    config = needed(config or stored, path, run, shapes_in_file)
    shapes, _ = model_shapes(config.model)
    check_model(checkpoint, shapes)
    notes = []
    if config.model.align_block:
        config = replace(config, model=config.model.without_alignment)
        shapes, _ = model_shapes(config.model)
        notes.append("the projector of model.align_block, which only training uses, is left out")
    names = [name.removeprefix("buffer/") for name in manifest.get("buffers", [])]
    parts = sum(len(rank["parts"]) for rank in manifest["ranks"])
    uses_muon = MOMENTUM in checkpoint.kinds
    return State(
        checkpoint.folder,
        "ours",
        config,
        int(manifest["step"]),
        int(manifest["updates"]) if set(KINDS) <= set(checkpoint.kinds) else 0,
        tuple(kind for kind in checkpoint.kinds if not uses_muon or kind not in (*MOMENTS, MOMENTUM)),
        shapes,
        {name: checkpoint.buffer(name) for name in names},
        checkpoint.logical,
        layout=f"{len(manifest['ranks'])} rank files, {parts} parts",
        notes=[*notes, *([MUON_NOTE] if uses_muon else [])],
        converted="run" not in manifest,  # training gives each checkpoint the identity of its run
        average=checkpoint.averages[AVERAGE],
        further_averages={kind: average for kind, average in checkpoint.averages.items() if kind != AVERAGE},
        read_range=checkpoint.read_range,
        lacks_moments=uses_muon,
    )
