"""The checkpoint format: fp32 masters, AdamW's moments and averages, by logical name and place; no layout.

A checkpoint is a folder ``step-00001000``: files ``rank-00000.safetensors`` and a ``manifest.json`` that says which
elements of which logical tensor each entry is, and every file's size and hash. A part is a range of some rank's
flattened slice of a parameter, so a rank writes its ZeRO partition as it lies in memory, each byte once over all ranks;
`Checkpoint.logical` puts whole tensors together again, at whatever layout they were saved.

A folder under its own name is complete: it is written aside and renamed when all of it, manifest last, is on disk. No
pickle is written or read.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megapromoe.checkpoint.manifest import MANIFEST, CheckpointError, read_manifest, seal
from megapromoe.io import atomic_write, sha256_of, sync, write_text
from megapromoe.io import commit as commit_staged
from megapromoe.work_progress import Progress

logger = logging.getLogger(__name__)

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


class TensorFile(Protocol):
    """An open file of tensors, read one by one."""

    def get_tensor(self, name: str) -> Tensor: ...


class OtherModel(CheckpointError):
    """A whole checkpoint, but of another model."""


class Checkpoint:
    """A complete checkpoint folder, opened for reading; tensors are read when asked for."""

    def __init__(self, folder: Path):
        """Raises CheckpointError, naming the file, if one is missing, has another size, or is not our format."""
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        for one in self.manifest["ranks"]:
            file = self.folder / one["file"]
            size = file.stat().st_size if file.is_file() else None
            if size != one["size"]:
                said = "is missing" if size is None else f"has {size} bytes, not {one['size']}"
                raise CheckpointError(f"{file}: {said}; the checkpoint is damaged, use another step")
            if file.resolve().parent != self.folder.resolve():
                raise CheckpointError(f"{file}: is a symbolic link out of its folder; put the file itself in its place")
        self.shapes: dict[str, list[int]] = self.manifest["shapes"]
        self.kinds: tuple[str, ...] = tuple(self.manifest.get("kinds", KINDS))
        self._parts: dict[str, list[tuple[str, int, int, list]]] = {}
        for one in self.manifest["ranks"]:
            for name, start, stop, view in one["parts"]:
                self._parts.setdefault(name, []).append((one["file"], start, stop, view))
        self._open: dict[str, TensorFile] = {}

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Reads every byte of every `parts`-th file, from the `part`-th; several ranks share the work.

        Raises CheckpointError naming a file whose hash is not the manifest's: bytes changed, or it is of another save.
        """
        files = self.manifest["ranks"][part::parts]
        total = sum(one["size"] for one in files)
        with Progress(total, "B", f"checking {self.folder}", enabled=part == 0, leave=False) as progress:
            for one in files:
                file = self.folder / one["file"]
                try:
                    intact = sha256_of(file, progress.update) == one["sha256"]
                except OSError as error:
                    raise CheckpointError(f"{file}: cannot be read ({error.strerror}); use another step") from error
                if not intact:
                    raise CheckpointError(f"{file}: {self._what_changed(file)}; use another step")

    def _what_changed(self, file: Path) -> str:
        try:
            with safe_open(file, framework="pt") as opened:
                step = (opened.metadata() or {}).get("step")
        except (SafetensorError, OSError):
            step = None
        if step not in (None, str(self.manifest["step"])):
            return f"is of step {step}, not {self.manifest['step']}"
        return "bytes changed since it was written"

    def logical(self, kind: str, name: str) -> Tensor:
        """The whole tensor of a parameter: kind "master", "exp_avg", "exp_avg_sq" or "ema"; float32."""
        if "kinds" in self.manifest and kind not in self.kinds:
            raise CheckpointError(
                f"{self.folder}: is a snapshot of {', '.join(self.kinds)} alone and has no {kind}; use --weights ema,"
                " or the step of a checkpoint"
            )
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
                flat[start:stop] = self._entry(file, f"{kind}/{name}@{start}", (stop - start,))
            for here, there in pairs:
                out[_slices(there)] = local[_slices(here)]
        return out

    def buffer(self, name: str) -> Tensor:
        """A buffer of the model that is no parameter."""
        return self._entry(self.manifest["ranks"][0]["file"], f"buffer/{name}")

    def _entry(self, file: str, entry: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor of a file. Raises CheckpointError if it is not in it, or of another shape."""
        try:
            tensor = self._file(file).get_tensor(entry)
        except (SafetensorError, KeyError, OSError) as error:
            raise CheckpointError(f"{self.folder / file}: has no {entry}; the checkpoint is damaged") from error
        if shape is not None and tuple(tensor.shape) != shape:
            raise CheckpointError(f"{self.folder / file}: {entry} has shape {tuple(tensor.shape)}, not {shape}")
        return tensor

    def _file(self, name: str) -> TensorFile:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]


def check_model(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises OtherModel listing parameters that differ between the checkpoint and a model of `shapes`."""
    said = {name: tuple(shape) for name, shape in checkpoint.shapes.items()}
    ours = {name: tuple(shape) for name, shape in shapes.items()}
    wrong = [f"{n}: the checkpoint has {said.get(n)}, the model {ours.get(n)}" for n in {**said, **ours}
             if said.get(n) != ours.get(n)]  # fmt: skip
    if wrong:
        shown = "\n  ".join(wrong[:10]) + (f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise OtherModel(
            f"{checkpoint.folder}: this checkpoint is of another model (None: it has no such parameter)\n  {shown}\n"
            "Use the config it was trained with, or another run directory."
        )


def write_rank(folder: Path, rank: int, tensors: Mapping[str, Tensor], parts: list[list], step: int) -> str:
    """Writes one rank's file, and then its receipt; returns what went wrong, or "".

    Args:
        tensors: entries ``kind/name@start`` (flat float32, in host memory) and ``buffer/name``.
        parts: [name, start, stop, view] of each piece; every kind has an entry of it.

    The receipt holds the file's size and hash, or the problem. Who cannot even write that is missed by `commit`.
    """
    file, problem = folder / f"rank-{rank:05d}.safetensors", ""
    receipt: dict[str, Any] = {"file": file.name, "parts": parts}
    try:
        save_file(dict(tensors), file, metadata={"step": str(step), "rank": str(rank)})
        sync(file)
        receipt |= {"size": file.stat().st_size, "sha256": sha256_of(file)}
    except Exception as error:  # whatever it is, the save has failed, and rank 0 must learn of it
        problem = f"{file}: {error or type(error).__name__}"
    try:
        with atomic_write(folder / f"rank-{rank:05d}.json") as part:
            part.write(json.dumps(receipt | {"problem": problem}).encode())
            if file.exists():  # safetensors makes files that only their owner may read
                os.chmod(file, os.fstat(part.fileno()).st_mode)
    except OSError as error:
        problem = problem or f"{error.filename or folder}: {error.strerror}"
    return problem


def commit(aside: Path, final: Path, world: int, facts: dict[str, Any], patience: float) -> None:
    """Waits for all ranks' receipts, writes the manifest, and gives the folder its name: now it is a checkpoint.

    Args:
        facts: what the manifest says beside the files: step, updates, shapes, buffers, ...
        patience: seconds to wait.

    Raises CheckpointError naming the ranks that had a problem or did not write in time.
    """
    deadline = time.monotonic() + patience
    paths = [aside / f"rank-{rank:05d}.json" for rank in range(world)]
    while missing := [p.stem for p in paths if not p.exists()]:
        if time.monotonic() > deadline:
            raise CheckpointError(f"{aside}: {', '.join(missing[:8])} did not write within {patience:.0f} s")
        time.sleep(0.02)
    receipts = [json.loads(p.read_text()) for p in paths]
    if problems := [r["problem"] for r in receipts if r["problem"]]:
        raise CheckpointError("; ".join(problems))
    for path, receipt in zip(paths, receipts, strict=True):
        del receipt["problem"]
        path.unlink()
    write_text(aside / MANIFEST, seal({**facts, "ranks": receipts}))
    if final.is_symlink() or final.exists():  # whatever it is, it is no checkpoint of this history
        kept = _free_name(final.with_name(f"{final.name}.replaced"))
        os.rename(final, kept)
        logger.warning("%s: was there before this checkpoint was saved, and is now %s", final, kept.name)
    commit_staged(aside, final)


def _free_name(path: Path) -> Path:
    """`path`, or with a number after it, such that nothing has that name."""
    names = chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2)))
    return next(name for name in names if not name.is_symlink() and not name.exists())


def _slices(region: list[list[int]]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in region)
