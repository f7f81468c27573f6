"""The checkpoint format: fp32 master weights, moments and averages, independent of the parallel layout.

A checkpoint is a folder ``step-00001000`` with a file ``rank-00000.safetensors`` for each rank and a ``manifest.json``.
The manifest maps each entry of a file to elements of a full (unsharded) parameter, and records the size and the hash of
each file. A part is a range of a rank's flattened shard of a parameter. So each rank writes its ZeRO partition as it is
in memory, and all ranks together write each element once. `Checkpoint.logical` assembles the full tensors from the
parts of any layout; `Checkpoint.read_range` reads what one rank needs of them.

A save writes to a staging folder (``step-00001000.writing``), the manifest last, flushes everything to disk and then
renames the folder. So a folder with the final name is complete. No pickle is written or read.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megapromoe.checkpoint.average import Average, kinds_of_averages
from megapromoe.checkpoint.manifest import MANIFEST, CheckpointError, read_manifest, seal
from megapromoe.checkpoint.tensor_writer import Entry, write_safetensors
from megapromoe.checkpoint.weights import kind_of
from megapromoe.distributed.shard_ranges import Region, ShardRange, copy_range
from megapromoe.io import atomic_write, sha256_of, write_text
from megapromoe.io import commit as commit_staged
from megapromoe.work_progress import Progress

logger = logging.getLogger(__name__)

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
"""The kinds of tensors in every checkpoint. A run with several decays also has a kind for each further average."""
MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTUM = "momentum"
"""The kind that parameters which Muon updates have in place of AdamW's `MOMENTS`; the manifest lists them."""


def all_kinds(averages: Iterable[str]) -> tuple[str, ...]:
    """The kinds of tensors in a checkpoint with averages of these kinds."""
    return (*KINDS, *(kind for kind in averages if kind not in KINDS))


class TensorFile(Protocol):
    """An open file from which single tensors can be read."""

    def get_tensor(self, name: str) -> Tensor: ...


class OtherModel(CheckpointError):
    """An undamaged checkpoint of another model."""


class OtherOptimizer(OtherModel):
    """An undamaged checkpoint whose optimizer state another optimizer cannot continue."""


class Checkpoint:
    """A complete checkpoint folder, opened for reading. Tensors are read on demand.

    Attributes:
        folder: the checkpoint folder.
        manifest: content of its manifest.json.
        shapes: parameter name -> shape of the full tensor.
        averages: kind of tensors -> state of each average; the first is `ema`.
        kinds: the kinds of tensors that it contains: `KINDS` and the further averages, or only averages in a snapshot.
        with_momentum: the parameters that Muon updates, which have `MOMENTUM` in place of `MOMENTS`.
    """

    def __init__(self, folder: Path):
        """Reads the manifest and checks that each file is there and has the recorded size.

        Raises CheckpointError, which names the file.
        """
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        for entry in self.manifest["ranks"]:
            file = self.folder / entry["file"]
            size = file.stat().st_size if file.is_file() else None
            if size != entry["size"]:
                problem = "is missing" if size is None else f"has {size} bytes, not {entry['size']}"
                raise CheckpointError(f"{file}: {problem}; the checkpoint is damaged, use another step")
            if file.resolve().parent != self.folder.resolve():
                raise CheckpointError(f"{file}: is a symbolic link out of its folder; put the file itself in its place")
        self.shapes: dict[str, list[int]] = self.manifest["shapes"]
        self.averages: dict[str, Average] = kinds_of_averages(self.manifest)
        self.with_momentum = frozenset(self.manifest.get("with_momentum", ()))
        kinds = all_kinds(self.averages) + ((MOMENTUM,) if self.with_momentum else ())
        self.kinds: tuple[str, ...] = tuple(self.manifest.get("kinds", kinds))
        self._parts: dict[str, list[tuple[str, int, int, list]]] = {}
        for entry in self.manifest["ranks"]:
            for name, start, stop, view in entry["parts"]:
                self._parts.setdefault(name, []).append((entry["file"], start, stop, view))
        self._ranges: dict[str, list[tuple[str, ShardRange]]] = {}  # of the parameter that was read last
        self._open: dict[str, TensorFile] = {}

    def kind_of(self, weights: str) -> str:
        """The kind of tensors of the chosen weights: `master`, `ema` or `ema=DECAY`.

        Raises UnknownWeights, which lists the decays, if there is no average of that decay.
        """
        return kind_of(weights, [average.decay for average in self.averages.values()], self.folder)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Reads files number `part`, `part` + `parts`, ... completely and compares their hashes with the manifest.

        Several ranks share the work: rank r of n calls `verify(r, n)`.

        Raises CheckpointError, naming the file, if its bytes changed or it belongs to another save.
        """
        files = self.manifest["ranks"][part::parts]
        total = sum(entry["size"] for entry in files)
        with Progress(total, "B", f"checking {self.folder}", enabled=part == 0, leave=False) as progress:
            for entry in files:
                file = self.folder / entry["file"]
                try:
                    intact = sha256_of(file, progress.update) == entry["sha256"]
                except OSError as error:
                    raise CheckpointError(f"{file}: cannot be read ({error.strerror}); use another step") from error
                if not intact:
                    raise CheckpointError(f"{file}: {self._what_changed(file)}; use another step")

    def _what_changed(self, file: Path) -> str:
        try:
            with safe_open(file, framework="pt") as opened:
                step = (opened.metadata() or {}).get("step")
        except (SafetensorError, OSError, RuntimeError):  # RuntimeError: see `_file`
            step = None
        if step not in (None, str(self.manifest["step"])):
            return f"is of step {step}, not {self.manifest['step']}"
        return "bytes changed since it was written"

    def logical(self, kind: str, name: str) -> Tensor:
        """Assembles the full tensor of a parameter, float32.

        Args:
            kind: one of `kinds`.
            name: the parameter.

        Raises CheckpointError if a file is damaged, or if this is a snapshot without that kind.
        """
        out = torch.zeros(self.shapes[name])
        self.read_range(kind, name, ShardRange.of_tensor(tuple(out.shape)), out.view(-1))
        return out

    def read_range(self, kind: str, name: str, target: ShardRange, out: Tensor) -> None:
        """Reads a range of a shard of a parameter, of any layout, and no other elements; padding becomes zero.

        Nothing of the size of a tensor is allocated: the files are mapped, and their elements are copied into `out`.

        Args:
            kind: one of `kinds`.
            name: the parameter.
            target: which elements.
            out: flat, contiguous, of any type and device, (target.stop - target.start,).

        Raises what `logical` raises.
        """
        if "kinds" in self.manifest and kind not in self.kinds:
            raise CheckpointError(
                f"{self.folder}: is a snapshot of {', '.join(self.kinds)} alone and has no {kind}; use --weights ema,"
                " or the step of a checkpoint"
            )
        if kind in MOMENTS and name in self.with_momentum:
            raise CheckpointError(f"{self.folder}: {name} is updated by Muon and has no {kind}, only {MOMENTUM}")
        if target.has_padding:
            out.zero_()
        for file, source in self._sources(name):
            if any(source.overlaps(box.region) for box in target.boxes):
                entry = self._entry(file, f"{kind}/{name}@{source.start}", (source.stop - source.start,))
                copy_range(target, out, source, entry)

    def _sources(self, name: str) -> list[tuple[str, ShardRange]]:
        """The parts of a parameter: file, and which elements it has of it."""
        if name not in self._ranges:
            self._ranges = {name: [(file, _range(start, stop, view)) for file, start, stop, view in self._parts[name]]}
        return self._ranges[name]

    def buffer(self, name: str) -> Tensor:
        """Reads a persistent buffer of the model. Raises CheckpointError if it is missing."""
        return self._entry(self.manifest["ranks"][0]["file"], f"buffer/{name}")

    def _entry(self, file: str, entry: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Reads a tensor of a file. Raises CheckpointError if it is missing or has another shape."""
        try:
            tensor = self._file(file).get_tensor(entry)
        except (SafetensorError, KeyError, OSError) as error:
            raise CheckpointError(f"{self.folder / file}: has no {entry}; the checkpoint is damaged") from error
        if shape is not None and tuple(tensor.shape) != shape:
            raise CheckpointError(f"{self.folder / file}: {entry} has shape {tuple(tensor.shape)}, not {shape}")
        return tensor

    def _file(self, name: str) -> TensorFile:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except RuntimeError as error:  # torch maps the file after safetensors has opened it: it may be gone
                raise OSError(f"{self.folder / name}: cannot be opened: {error}") from error
        return self._open[name]


def check_model(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises OtherModel, listing the parameters whose shapes differ between the checkpoint and a model.

    Args:
        shapes: parameter name -> shape of the full tensor in the model.
    """
    stored = {name: tuple(shape) for name, shape in checkpoint.shapes.items()}
    expected = {name: tuple(shape) for name, shape in shapes.items()}
    wrong = [
        f"{n}: the checkpoint has {stored.get(n)}, the model {expected.get(n)}"
        for n in {**stored, **expected}
        if stored.get(n) != expected.get(n)
    ]
    if wrong:
        shown = "\n  ".join(wrong[:10]) + (f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise OtherModel(
            f"{checkpoint.folder}: this checkpoint is of another model (None: it has no such parameter)\n  {shown}\n"
            "Use the config it was trained with, or another run directory."
        )


def check_optimizer(checkpoint: Checkpoint, with_momentum: frozenset[str]) -> None:
    """Raises OtherOptimizer if the checkpoint has only a momentum of parameters that AdamW updates.

    Args:
        with_momentum: the parameters that Muon updates from now on. Their momentum starts at zero if there is none.
    """
    if missing := sorted(checkpoint.with_momentum - with_momentum):
        raise OtherOptimizer(
            f"{checkpoint.folder}: its optimizer was Muon for {len(missing)} parameters ({missing[0]} ...), of which it"
            " has no moments of AdamW; continue with train.optimizer=muon, or write its weights as another run, whose"
            " moments start at zero, by `megapromoe convert RUN OTHER --to ours`, and continue that with"
            " --allow train.optimizer"
        )


def write_rank(folder: Path, rank: int, tensors: Mapping[str, Tensor], parts: list[list], step: int) -> str:
    """Writes the file of a rank and then its receipt. Returns the problem, or "".

    Args:
        tensors: entries ``kind/name@start`` (flat float32) and ``buffer/name``, on any device: each is copied to the
            host when it is written.
        parts: [name, start, stop, view] of each piece; each kind of tensor has an entry for it.

    The receipt contains the size and the hash of the file, or the problem.

    Raises CheckpointError if the receipt cannot be written. `commit`, on rank 0, reports other ranks without a receipt
    after its timeout.
    """
    file, problem = folder / f"rank-{rank:05d}.safetensors", ""
    receipt: dict[str, Any] = {"file": file.name, "parts": parts}
    try:
        ordered = sorted(tensors, key=lambda name: -tensors[name].element_size())  # so that all are aligned
        entries = {name: _entry_of(tensors[name]) for name in ordered}
        size, digest = write_safetensors(file, entries, {"step": str(step), "rank": str(rank)})
        receipt |= {"size": size, "sha256": digest}
    except Exception as error:  # any failure of the save must reach rank 0
        problem = f"{file}: {error or type(error).__name__}"
    try:
        with atomic_write(folder / f"rank-{rank:05d}.json") as part:
            part.write(json.dumps(receipt | {"problem": problem}).encode())
    except OSError as error:
        raise CheckpointError(problem or f"{error.filename or folder}: {error.strerror}") from error
    return problem


def commit(staging: Path, final: Path, world: int, metadata: dict[str, Any], commit_timeout: float) -> None:
    """Waits for the receipts of all ranks, writes the manifest, and renames the staging folder to its final name.

    Args:
        staging: the folder that all ranks have written to.
        final: the name of the complete checkpoint.
        world: number of ranks.
        metadata: entries of the manifest other than the files: step, updates, shapes, buffers, ...
        commit_timeout: seconds to wait for the receipts.

    Raises CheckpointError, naming the ranks that had a problem or did not write in time, and at once if the staging
    folder is gone; OSError.
    """
    deadline = time.monotonic() + commit_timeout
    paths = [staging / f"rank-{rank:05d}.json" for rank in range(world)]
    while missing := [p.stem for p in paths if not p.exists()]:
        if not staging.is_dir():
            raise CheckpointError(f"{staging}: was removed or renamed while the checkpoint was written")
        if time.monotonic() > deadline:
            raise CheckpointError(f"{staging}: {', '.join(missing[:8])} did not write within {commit_timeout:.0f} s")
        time.sleep(0.02)
    receipts = [json.loads(p.read_text()) for p in paths]
    if problems := [r["problem"] for r in receipts if r["problem"]]:
        raise CheckpointError("; ".join(problems))
    for path, receipt in zip(paths, receipts, strict=True):
        del receipt["problem"]
        path.unlink()
    write_text(staging / MANIFEST, seal({**metadata, "ranks": receipts}))
    if final.is_symlink() or final.exists():  # not a checkpoint of this branch: keep it
        kept = _free_name(final.with_name(f"{final.name}.replaced"))
        os.rename(final, kept)
        logger.warning("%s: existed before this checkpoint was saved; it was renamed to %s", final, kept.name)
    commit_staged(staging, final)


def _entry_of(tensor: Tensor) -> Entry:
    return Entry(tuple(tensor.shape), tensor.dtype, tensor.cpu)


def _free_name(path: Path) -> Path:
    """`path` if it does not exist, else `path` with the first free number appended."""
    names = chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2)))
    return next(name for name in names if not name.is_symlink() and not name.exists())


def _range(start: int, stop: int, view: list) -> ShardRange:
    """The elements of a part, from its entry in a manifest."""
    shape, pairs = view
    return ShardRange(tuple(shape), tuple((_region(local), _region(logical)) for local, logical in pairs), start, stop)


def _region(spans: list[list[int]]) -> Region:
    return tuple((start, stop) for start, stop in spans)
