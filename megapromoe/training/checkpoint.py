"""Saving and loading a run: between the engine's partitions and the checkpoint format (`checkpoint_file.py`)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megapromoe.training.checkpoint_file import (
    FORMAT,
    KINDS,
    Checkpoint,
    CheckpointError,
    check_model,
    folder_of,
    sha256_of,
    steps_in,
    sync,
)
from megapromoe.training.ema import EMA
from megapromoe.training.engine import Engine, Piece


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
        sync(root)
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
        sync(file)
        entry = {"size": file.stat().st_size, "sha256": sha256_of(file)}
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
        sync(path)
    dist.barrier()


def load(checkpoint: Checkpoint, engine: Engine, ema: EMA) -> int:
    """Puts masters, moments, averages and buffers back, at any layout; returns the step. Collective.

    Raises CheckpointError, before anything is changed, if the checkpoint is of another model.
    """
    check_model(checkpoint, {name: layout.shape for name, layout in engine.layouts.items()})
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
