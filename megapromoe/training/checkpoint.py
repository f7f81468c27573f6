"""Checkpoints without a layout: fp32 masters, AdamW's moments and averages, by logical name and place.

A checkpoint is a folder ``step-00001000``: each rank's ``rank-00000.safetensors`` and a ``manifest.json`` that says
which elements of which logical tensor each entry is. A part is a range of some rank's flattened slice of a parameter,
so a rank writes its ZeRO partition as it lies in memory, each byte once over all ranks; `Checkpoint.logical` puts
whole tensors together again, at whatever layout they were saved.

The folder is written aside and renamed when all of it, manifest last, is on disk: a folder under its own name is
complete. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megapromoe.parallel.layout import ParameterLayout
from megapromoe.training.ema import EMA
from megapromoe.training.engine import Engine, Piece

FORMAT = 1
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
_FOLDER = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint that is not there, not whole, or of another model."""


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:08d}"


def steps_in(root: Path) -> list[int]:
    """Steps of the complete checkpoints under `root`, ascending."""
    if not root.is_dir():
        return []
    found = (_FOLDER.fullmatch(p.name) for p in root.iterdir() if (p / "manifest.json").is_file())
    return sorted(int(match[1]) for match in found if match)


def save(root: Path, engine: Engine, ema: EMA, facts: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of `facts["step"]`, and removes all but the newest `keep`. Collective.

    Args:
        facts: goes into the manifest: step, config, versions. The data state is the step: see data/loader.py.

    Raises CheckpointError on every rank if any rank could not write; nothing older is touched then.
    """
    final = folder_of(root, facts["step"])
    aside = root / f"{final.name}.writing"
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    buffers = {f"buffer/{name}": b for name, b in engine.module.state_dict().items() if name not in engine.layouts}
    write(aside, engine, _state(engine, ema), buffers, facts)
    if dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _sync(root)
        for step in steps_in(root)[:-keep]:
            old = folder_of(root, step)
            (old / "manifest.json").unlink()  # first, so that what remains of a killed removal is no checkpoint
            shutil.rmtree(old)
    dist.barrier()
    return final


def write(
    folder: Path,
    engine: Engine,
    items: Iterable[tuple[str, Piece, Tensor]],
    buffers: dict[str, Tensor],
    facts: dict[str, Any],
) -> None:
    """Writes this rank's `items` (kind, piece, flat tensor) and rank 0's `buffers` and manifest. Collective."""
    rank = dist.get_rank()
    tensors, parts = {}, {}
    for kind, piece, tensor in items:
        if engine.is_writer(piece.name):
            tensors[f"{kind}/{piece.name}@{piece.start}"] = (
                tensor.detach().to("cpu", torch.float32).contiguous().clone()
            )
            parts[piece.name, piece.start] = piece.stop
    if rank == 0:
        tensors |= {name: b.detach().cpu().contiguous() for name, b in buffers.items()}
    file, error = folder / f"rank-{rank:05d}.safetensors", None
    try:
        save_file(tensors, file)
        _sync(file)
        entry = {"size": file.stat().st_size, "sha256": _sha256(file)}
    except (OSError, SafetensorError) as problem:
        entry, error = {}, f"{file}: {problem}"
    mine = {
        "file": file.name,
        **entry,
        "parts": [[name, start, stop, _view(engine, name)] for (name, start), stop in parts.items()],
        "error": error,
    }
    everyone: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    if errors := [one["error"] for one in everyone if one["error"]]:
        raise CheckpointError("the checkpoint was not saved: " + "; ".join(errors))
    if rank == 0:
        shapes = {name: list(layout.shape) for name, layout in engine.layouts.items()}
        manifest = {
            "format": FORMAT,
            **facts,
            "shapes": shapes,
            "buffers": sorted(buffers),
            "ranks": everyone,
        }
        path = folder / "manifest.json"
        path.write_text(json.dumps(manifest))
        _sync(path)
    dist.barrier()


class Checkpoint:
    """A complete checkpoint folder, opened for reading; tensors are read when asked for."""

    def __init__(self, folder: Path):
        """Raises CheckpointError, naming the file, if one is missing, has another size, or is not our format."""
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        try:
            self.manifest = json.loads(path.read_text())
        except OSError as problem:
            raise CheckpointError(f"{path}: {problem.strerror}; this is no complete checkpoint") from problem
        except ValueError as problem:
            raise CheckpointError(f"{path}: is not JSON; the checkpoint is damaged, use another step") from problem
        if self.manifest.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format {self.manifest.get('format')!r}, this version reads {FORMAT}")
        for one in self.manifest["ranks"]:
            file = self.folder / one["file"]
            size = file.stat().st_size if file.is_file() else None
            if size != one["size"]:
                said = "is missing" if size is None else f"has {size} bytes, not {one['size']}"
                raise CheckpointError(f"{file}: {said}; the checkpoint is damaged, use another step")
        self.shapes: dict[str, list[int]] = self.manifest["shapes"]
        self._parts: dict[str, list[tuple[str, int, int, list]]] = {}
        for one in self.manifest["ranks"]:
            for name, start, stop, view in one["parts"]:
                self._parts.setdefault(name, []).append((one["file"], start, stop, view))
        self._open: dict[str, Any] = {}

    def verify(self) -> None:
        """Reads every byte; raises CheckpointError naming a file whose hash is not the manifest's."""
        for one in self.manifest["ranks"]:
            if _sha256(self.folder / one["file"]) != one["sha256"]:
                raise CheckpointError(
                    f"{self.folder / one['file']}: bytes changed since it was written; use another step"
                )

    def logical(self, kind: str, name: str) -> Tensor:
        """The whole tensor of a parameter: kind "master", "exp_avg", "exp_avg_sq" or "ema"; float32."""
        shape = self.shapes[name]
        out = torch.zeros(shape)
        by_view: dict[str, list] = {}
        for part in self._parts[name]:
            by_view.setdefault(json.dumps(part[3]), []).append(part)
        for view, parts in by_view.items():
            local_shape, pairs = json.loads(view)
            local = torch.zeros(local_shape)
            flat = local.view(-1)
            for file, start, stop, _ in parts:
                flat[start:stop] = self._file(file).get_tensor(f"{kind}/{name}@{start}")
            for here, there in pairs:
                out[_slices(there)] = local[_slices(here)]
        return out

    def buffer(self, name: str) -> Tensor:
        """A buffer of the model that is no parameter."""
        return self._file(self.manifest["ranks"][0]["file"]).get_tensor(f"buffer/{name}")

    def _file(self, name: str):
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]


def load(checkpoint: Checkpoint, engine: Engine, ema: EMA) -> int:
    """Puts masters, moments, averages and buffers back, at any layout; returns the step. Collective.

    Raises CheckpointError, before anything is changed, if the checkpoint is of another model.
    """
    check_model(checkpoint, engine.layouts)
    checkpoint.verify()
    restore(engine, ema, checkpoint.logical, checkpoint.buffer, int(checkpoint.manifest["updates"]))
    return int(checkpoint.manifest["step"])


@torch.no_grad()
def restore(
    engine: Engine,
    ema: EMA,
    logical: Callable[[str, str], Tensor],
    buffer: Callable[[str], Tensor],
    updates: int,
) -> None:
    """Fills a run's state from logical tensors. Collective.

    Args:
        logical: (kind of `KINDS`, parameter) -> whole tensor.
        buffer: name -> tensor, for the model's persistent buffers.
        updates: AdamW steps behind the moments.
    """
    targets: dict[str, list[tuple[Piece, dict[str, Tensor]]]] = {}
    for piece, tensors in _held(engine, ema):
        targets.setdefault(piece.name, []).append((piece, tensors))
    for name, held in targets.items():
        for kind in KINDS:
            local = engine.layouts[name].take(logical(kind, name), engine.mesh).view(-1)
            for piece, tensors in held:
                tensors[kind].copy_(local[piece.start : piece.stop])
    for name, tensor in engine.module.state_dict().items():
        if name not in engine.layouts:
            tensor.copy_(buffer(name))
    engine.masters_changed()
    engine.set_optimizer_step(updates)


def check_model(checkpoint: Checkpoint, layouts: dict[str, ParameterLayout]) -> None:
    """Raises CheckpointError listing parameters that differ between the checkpoint and the model."""
    said = {name: tuple(shape) for name, shape in checkpoint.shapes.items()}
    ours = {name: layout.shape for name, layout in layouts.items()}
    wrong = [f"{n}: the checkpoint has {said.get(n)}, the model {ours.get(n)}" for n in {**said, **ours}
             if said.get(n) != ours.get(n)]  # fmt: skip
    if wrong:
        shown = "\n  ".join(wrong[:10]) + (f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise CheckpointError(
            f"{checkpoint.folder}: this checkpoint is of another model (None: it has no such parameter)\n  {shown}\n"
            "Use the config it was trained with, or another run directory."
        )


def _state(engine: Engine, ema: EMA) -> Iterator[tuple[str, Piece, Tensor]]:
    for piece, tensors in _held(engine, ema):
        for kind in KINDS:
            yield kind, piece, tensors[kind]


def _held(engine: Engine, ema: EMA) -> Iterator[tuple[Piece, dict[str, Tensor]]]:
    """Every piece this rank holds, with views of its master, moments and average."""
    for partition, average in zip(engine.partitions, ema.averages, strict=True):
        flats = {"master": partition.master, "ema": average, **engine.moments(partition)}
        for piece in partition.pieces:
            span = slice(piece.offset, piece.offset + piece.stop - piece.start)
            yield piece, {kind: flat[span] for kind, flat in flats.items()}


def _view(engine: Engine, name: str) -> list:
    """JSON of how this rank's slice lies in the logical tensor: [local shape, [[local, logical], ...]]."""
    layout = engine.layouts[name]
    pairs = [[[[s.start, s.stop] for s in region] for region in pair] for pair in layout.pieces(engine.mesh)]
    return [list(layout.local_shape(engine.mesh)), pairs]


def _slices(region: list[list[int]]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in region)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Forces a file's, or a folder's, content to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
