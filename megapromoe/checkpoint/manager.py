"""Saves and restores the training state: from the engine's partitions to the checkpoint format and back.

A save blocks training only while the state is copied to host memory; a background thread writes the files. With
`train.save_in_background=false` there is no copy, and training waits until the files are written. Ranks do not
communicate while they write: each rank writes a receipt beside its file, and rank 0 commits the checkpoint when all
receipts exist. If the run is killed meanwhile, a folder ``*.writing`` remains. It is not a checkpoint, and the next
save removes it. A snapshot of the averaged weights (`snapshots.py`) is saved in the same way, from the same copy if a
checkpoint is due at the same step.
"""

from __future__ import annotations

import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megapromoe.checkpoint.average import averages_at_start
from megapromoe.checkpoint.format import (
    MOMENTUM,
    Checkpoint,
    CheckpointError,
    OtherModel,
    all_kinds,
    check_model,
    check_optimizer,
    commit,
    write_rank,
)
from megapromoe.checkpoint.local_state import LocalState, copy_to_host, local_pieces, local_tensors, view_state
from megapromoe.checkpoint.manifest import FOLDER
from megapromoe.checkpoint.origin import OtherRun
from megapromoe.checkpoint.retention import prune, remove_leftovers
from megapromoe.checkpoint.step_folders import (
    folder_of,
    folders_without_manifest,
    snapshot_of,
    snapshots_beside,
    steps_in,
    warn_without_manifest,
)
from megapromoe.checkpoint.weights import average_kinds
from megapromoe.distributed import watchdog
from megapromoe.distributed.agreement import all_gather_values, broadcast_from_rank0, this_rank, world_size
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.io import staging_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Destination:
    """A folder that a save writes.

    Attributes:
        final: its name when it is complete.
        kinds: the kinds of tensors to save.
        snapshot: whether it is a snapshot, without all kinds.
    """

    final: Path
    kinds: tuple[str, ...]
    snapshot: bool = False

    @property
    def staging(self) -> Path:
        """Its name while it is written."""
        return staging_path(self.final)

    @property
    def metadata(self) -> dict[str, Any]:
        """The manifest entry for the kinds; a checkpoint, which has all kinds, has none."""
        return {"kinds": list(self.kinds)} if self.snapshot else {}


class CheckpointManager:
    """Saves checkpoints of a run under `root`, and snapshots beside it, in the background, one save at a time.

    Attributes:
        failures: number of saves that failed in a row.
        save_metrics: of the last finished save: `save_stall_ms`, `save_seconds`, `save_bytes`.
    """

    def __init__(self, root: Path, engine: Engine, ema: EMA, commit_timeout: float):
        """Args: `commit_timeout`: seconds that rank 0 waits for the files of the other ranks; then the save fails."""
        t = engine.config.train
        self.root, self.engine, self.ema, self.commit_timeout = root, engine, ema, commit_timeout
        self.limit, self.in_background = t.max_failed_saves, t.save_in_background
        self.failures = 0
        self.save_metrics: dict[str, float] = {}
        self._thread: threading.Thread | None = None
        self._step: int | None = None  # step of the running save, or of one whose result is not shared yet
        self._problem = ""

    def save(self, metadata: dict[str, Any], checkpoint: bool = True, snapshot: bool = False) -> None:
        """Starts to save step `metadata["step"]`, after the previous save has finished. Collective.

        With `train.save_in_background=false` it returns when the save has finished.

        Args:
            metadata: entries of the manifest: step, updates, config, ... The step is also the position in the data. The
                values of rank 0 are written. Old checkpoints with the same `run`, the run's identity, are pruned.
            checkpoint: whether to save the complete state.
            snapshot: whether to save the averaged weights in a folder of their own.

        Raises CheckpointError on every rank when `train.max_failed_saves` saves in a row have failed. A failed save is
        logged, training continues, and older checkpoints are kept.
        """
        self.finish()
        start = time.perf_counter()
        engine = self.engine
        buffers = {n: b for n, b in engine.module.state_dict().items() if n not in engine.layouts}
        averages, destinations = average_kinds(self.ema.decays), []
        kinds = (*all_kinds(averages), MOMENTUM) if checkpoint else averages
        if checkpoint:  # written first: a job that is about to be killed can resume from it
            destinations.append(Destination(folder_of(self.root, metadata["step"]), kinds))
        if snapshot:
            folder = snapshot_of(snapshots_beside(self.root), metadata["step"])
            destinations.append(Destination(folder, averages, snapshot=True))
        hold = copy_to_host if self.in_background else view_state
        state = hold(engine, local_tensors(engine, self.ema, kinds), buffers)
        size = sum(state.select_kinds(destination.kinds).bytes for destination in destinations)
        total = self._agree_to_start(destinations, size, metadata)
        if total is None:
            return
        shapes = {name: list(layout.shape) for name, layout in engine.layouts.items()}
        metadata = {**metadata, "shapes": shapes, "buffers": sorted(buffers)}
        if engine.hidden_parameters:
            metadata["with_momentum"] = sorted(engine.hidden_parameters)
        self._step = metadata["step"]
        self.save_metrics = {"save_stall_ms": 1000 * (time.perf_counter() - start), "save_bytes": float(total)}
        self._problem = "its thread ended early"  # `_write` replaces this when it ends
        arguments = (destinations, state, metadata)
        if not self.in_background:
            self._write(*arguments)
            self.save_metrics["save_stall_ms"] = 1000 * (time.perf_counter() - start)
            self.finish()
            return
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint writer", daemon=True)
        self._thread.start()

    def finish(self, last: bool = False) -> None:
        """Waits for the running save and shares its result with all ranks. Collective.

        Args:
            last: this is the last save of the run.

        Raises CheckpointError as `save` does, and with `last` also if the latest save failed.
        """
        if self._step is not None:
            step, self._step = self._step, None
            watchdog.at(f"writing this rank's file of the checkpoint of step {step}", math.inf)
            if self._thread is not None:
                self._thread.join()
                self._thread = None
            watchdog.at(f"waiting for the other ranks' files of the checkpoint of step {step}", math.inf)
            problem, self.save_metrics = broadcast_from_rank0((self._problem, self.save_metrics))
            self._count(problem)
        if last and self.failures:
            raise CheckpointError(f"the run's last checkpoint could not be saved: {self._problem}")

    def _agree_to_start(self, destinations: list[Destination], size: int, metadata: Mapping[str, Any]) -> int | None:
        """Creates the staging folders if the disk has room for the bytes of all ranks.

        Returns the bytes of all ranks, or None if the save failed here. Collective.
        """
        needed, problem = sum(all_gather_values(size)), ""
        if this_rank() == 0:
            try:
                for root in (self.root, snapshots_beside(self.root)):
                    remove_leftovers(root)
                self._prune(metadata)  # more checkpoints may be proven than at the last save
                free = shutil.disk_usage(self.root).free
                if free < 1.02 * needed:
                    problem = (
                        f"{self.root}: no room, need {needed:,} bytes, have {free:,}; free some, or set"
                        " train.keep_last=1"
                    )
                else:
                    for destination in destinations:
                        destination.staging.mkdir(parents=True)
            except OSError as error:
                problem = f"{error.filename or self.root}: {error.strerror}"
        problem = broadcast_from_rank0(problem)
        if problem:  # success is counted in `finish`
            self._count(problem)
            return None
        return needed

    def _count(self, problem: str) -> None:
        self._problem = problem
        if not problem:
            self.failures = 0
            return
        self.failures += 1
        logger.warning("a checkpoint was not saved (%d of %d in a row): %s", self.failures, self.limit, problem)
        if self.failures >= self.limit:
            raise CheckpointError(
                f"{self.failures} checkpoints in a row were not saved (train.max_failed_saves = {self.limit}),"
                f" the last because: {problem}"
            )

    def _write(self, destinations: list[Destination], state: LocalState, metadata: dict[str, Any]) -> None:
        """Writes all destinations, also after a failure of one."""
        start = time.perf_counter()
        problems = [self._write_to(destination, state, metadata) for destination in destinations]
        self.save_metrics["save_seconds"] = time.perf_counter() - start
        self._problem = "; ".join(problem for problem in problems if problem)

    def _write_to(self, to: Destination, state: LocalState, metadata: dict[str, Any]) -> str:
        """Writes one destination; returns the problem, or "". Rank 0 reads all ranks' problems from their receipts."""
        rank, world = this_rank(), world_size()
        try:
            problem = write_rank(to.staging, rank, state.select_kinds(to.kinds).tensors, state.parts, metadata["step"])
            if rank == 0:
                commit(to.staging, to.final, world, metadata | to.metadata, self.commit_timeout)
                problem = ""
                if not to.snapshot:
                    self._prune(metadata)
        except Exception as error:  # of any kind: an exception that ended the thread would be lost
            unexpected = not isinstance(error, CheckpointError | OSError)
            logger.debug("the save of step %d failed", metadata["step"], exc_info=unexpected)
            problem = f"{type(error).__name__}: {error}" if unexpected else str(error)
        return problem

    def _prune(self, metadata: Mapping[str, Any]) -> None:
        t = self.engine.config.train
        run, step, updates = metadata.get("run"), metadata["step"], metadata["updates"]
        prune(self.root, run, step, updates, t.keep_last, t.keep_every, t.max_bad_steps)


@dataclass
class Resumed:
    """The result of `resume`.

    Attributes:
        checkpoint: the checkpoint that was loaded.
        damaged: step -> problem of each newer checkpoint, which was skipped.
    """

    checkpoint: Checkpoint
    damaged: dict[int, str] = field(default_factory=dict)


def resume(
    root: Path,
    engine: Engine,
    ema: EMA,
    step: int | None = None,
    accept: Callable[[Path, Mapping[str, Any]], None] | None = None,
) -> Resumed | None:
    """Loads the newest undamaged checkpoint, or exactly that of `step`. Returns None if there is none. Collective.

    Without `step`, damaged checkpoints are logged and skipped.

    Args:
        root: the folder of checkpoints.
        engine, ema: their state is overwritten.
        step: the step to load; None: the newest undamaged one.
        accept: called with the folder and the manifest of a checkpoint; raises OtherRun if it must not be used.

    Raises CheckpointError on every rank, before anything is changed, if the checkpoint of `step` is missing or damaged,
    if all checkpoints are damaged, or if the checkpoint is of another model or run.
    """
    steps, incomplete = broadcast_from_rank0(
        (steps_in(root), folders_without_manifest(root))
    )  # all ranks use the listing of rank 0
    warn_without_manifest(incomplete)
    if step is not None:
        if step not in steps:
            raise CheckpointError(f"{root}: has no complete checkpoint of step {step}; there are {steps or 'none'}")
        steps = [step]
    damaged: dict[int, str] = {}
    for candidate in reversed(steps):
        problem, checkpoint = "", None
        try:
            checkpoint = Checkpoint(folder_of(root, candidate))
            check_model(checkpoint, {name: layout.shape for name, layout in engine.layouts.items()})
            check_optimizer(checkpoint, engine.hidden_parameters)
            if accept:
                accept(checkpoint.folder, checkpoint.manifest)
            checkpoint.verify(this_rank(), world_size())
        except (OtherModel, OtherRun):
            raise  # every rank reads the same manifest and raises the same
        except CheckpointError as error:
            problem = str(error)
        damage = "; ".join(dict.fromkeys(p for p in all_gather_values(problem) if p))
        if not damage:
            assert checkpoint is not None  # no rank had a problem, so this one has read it
            updates = int(checkpoint.manifest["updates"])
            starts = averages_at_start(list(checkpoint.averages.values()), engine.config.train)
            sources = dict(zip(average_kinds(ema.decays), (start.source for start in starts), strict=True))
            restore(engine, ema, checkpoint, updates, sources)
            return Resumed(checkpoint, damaged)
        if step is not None:
            raise CheckpointError(damage)
        logger.warning("skipping a damaged checkpoint: %s", damage)
        damaged[candidate] = damage
    if steps:
        raise CheckpointError(f"{root}: none of the checkpoints {steps} is whole; move them away to start from step 0")
    if folders := broadcast_from_rank0(_step_folders(root)):
        names = ", ".join(folder.name for folder in folders[:8])
        raise CheckpointError(
            f"{root}: holds {names}, none a whole checkpoint of its step; move them away to start from step 0"
        )
    return None


def _step_folders(root: Path) -> list[Path]:
    """The folders under `root` whose names are those of checkpoints."""
    folders = root.iterdir() if root.is_dir() else ()
    return sorted(folder for folder in folders if FOLDER.fullmatch(folder.name))


@torch.no_grad()
def restore(
    engine: Engine,
    ema: EMA,
    checkpoint: Checkpoint,
    updates: int,
    sources: Mapping[str, str] | None = None,
) -> None:
    """Restores the training state of this rank, reading what it needs of each tensor, one after the other. Collective.

    Args:
        engine, ema: their state is overwritten.
        checkpoint: of the same logical model, saved at any layout.
        updates: number of updates that the moments contain.
        sources: kind of each average -> the kind that it is restored from, if that is another one.
    """
    hidden = engine.hidden_parameters
    begun = hidden - checkpoint.with_momentum if hidden else hidden
    if begun and this_rank() == 0:
        logger.info("train.optimizer: the momentum of %d parameters, which Muon updates, begins at zero", len(begun))
    for piece, tensors in local_pieces(engine, ema):
        watchdog.touch()
        target = engine.layouts[piece.name].shard_range(engine.mesh, piece.start, piece.stop)
        for kind, tensor in tensors.items():
            if kind == MOMENTUM and piece.name in begun:
                tensor.zero_()
            else:
                checkpoint.read_range((sources or {}).get(kind, kind), piece.name, target, tensor)
    for name, tensor in engine.module.state_dict().items():
        if name not in engine.layouts:
            tensor.copy_(checkpoint.buffer(name))
    engine.sync_parameters_from_masters()
    engine.set_optimizer_step(updates)
