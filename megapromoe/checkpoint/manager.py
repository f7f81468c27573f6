"""Saving and loading a run: between the engine's partitions and the checkpoint format (`format.py`).

A save stalls training for a copy to host memory; files are written by a thread. Ranks do not talk while they write:
each leaves a receipt beside its file, and rank 0 commits when all receipts are there. A run killed at any instant
leaves a folder named ``.writing``, which is no checkpoint and is removed by the next save. A snapshot of the averages
alone (`snapshots.py`) is saved in the same way, of the same copy where both are due at one step.
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
from torch import Tensor

from megapromoe.checkpoint.format import (
    KINDS,
    Checkpoint,
    CheckpointError,
    OtherModel,
    check_model,
    commit,
    write_rank,
)
from megapromoe.checkpoint.local_state import LocalState, copy_to_host, held_pieces, items_of
from megapromoe.checkpoint.manifest import FOLDER
from megapromoe.checkpoint.origin import OtherRun
from megapromoe.checkpoint.retention import remove_leftovers, retire
from megapromoe.checkpoint.snapshots import AVERAGES
from megapromoe.checkpoint.step_folders import (
    folder_of,
    folders_without_manifest,
    snapshot_of,
    snapshots_beside,
    steps_in,
    warn_without_manifest,
)
from megapromoe.distributed import watchdog
from megapromoe.distributed.agreement import all_gather_values, broadcast_from_rank0, this_rank, world_size
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.engine.protocol import Piece
from megapromoe.io import staging_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Destination:
    """A folder that a save writes, and the kinds of `KINDS` in it."""

    final: Path
    kinds: tuple[str, ...]

    @property
    def staging(self) -> Path:
        return staging_path(self.final)

    @property
    def facts(self) -> dict[str, Any]:
        """What its manifest says of the kinds; a checkpoint has all."""
        return {} if self.kinds == KINDS else {"kinds": list(self.kinds)}


class Saver:
    """Saves checkpoints of a run under `root`, and snapshots beside it, one save at a time, in the background."""

    def __init__(self, root: Path, engine: Engine, ema: EMA, patience: float):
        """Args: `patience`: seconds that rank 0 waits for the other ranks' files before it gives a save up."""
        t = engine.config.train
        self.root, self.engine, self.ema, self.patience = root, engine, ema, patience
        self.limit = t.max_failed_saves
        self.failures = 0
        self.figures: dict[str, float] = {}  # of the last save that ended: stall ms, save s, bytes
        self._thread: threading.Thread | None = None
        self._step = 0  # of the save in flight
        self._problem = ""

    def save(self, facts: dict[str, Any], checkpoint: bool = True, snapshot: bool = False) -> None:
        """Starts the checkpoint of `facts["step"]`; waits for the one before, if it is still being written. Collective.

        Args:
            facts: goes into the manifest: step, updates, config, ... The state of the data is the step. Rank 0's are
                written; of its `run`, the run's identity, checkpoints are removed by `retention.py`.
            checkpoint, snapshot: whether to save all state, the averages alone, or each in a folder of its own.

        Raises CheckpointError on every rank when `train.max_failed_saves` saves in a row have failed. A failed save is
        logged, training goes on, and older checkpoints stay.
        """
        self.finish()
        start = time.perf_counter()
        engine = self.engine
        buffers = {n: b for n, b in engine.module.state_dict().items() if n not in engine.layouts}
        destinations = []
        if checkpoint:  # first: a job that is about to be killed needs it more
            destinations.append(Destination(folder_of(self.root, facts["step"]), KINDS))
        if snapshot:
            destinations.append(Destination(snapshot_of(snapshots_beside(self.root), facts["step"]), AVERAGES))
        kinds = KINDS if checkpoint else AVERAGES
        state = copy_to_host(engine, items_of(engine, self.ema, kinds), buffers)
        size = sum(state.of_kinds(destination.kinds).bytes for destination in destinations)
        total = self._agree_to_start(destinations, size, facts)
        if total is None:
            return
        facts = {**facts, "shapes": {n: list(p.shape) for n, p in engine.layouts.items()}, "buffers": sorted(buffers)}
        self._step = facts["step"]
        self.figures = {"save_stall_ms": 1000 * (time.perf_counter() - start), "save_bytes": float(total)}
        self._problem = "its thread ended early"  # until the thread says otherwise
        arguments = (destinations, state, facts)
        self._thread = threading.Thread(target=self._write, args=arguments, name="saver", daemon=True)
        self._thread.start()

    def finish(self, last: bool = False) -> None:
        """Waits until the save in flight is over; all ranks learn how it went. Collective.

        Raises CheckpointError as `save` does; with `last`, for any failure.
        """
        if self._thread is not None:
            step = self._step
            watchdog.at(f"writing this rank's file of the checkpoint of step {step}", math.inf)
            self._thread.join()
            self._thread = None
            watchdog.at(f"waiting for the other ranks' files of the checkpoint of step {step}", math.inf)
            problem, self.figures = broadcast_from_rank0((self._problem, self.figures))
            self._count(problem)
        if last and self.failures:
            raise CheckpointError(f"the run's last checkpoint could not be saved: {self._problem}")

    def _agree_to_start(self, destinations: list[Destination], size: int, facts: Mapping[str, Any]) -> int | None:
        """Makes the folders if there is room for all ranks' bytes; None, and a failure, if not."""
        needed, problem = sum(all_gather_values(size)), ""
        if this_rank() == 0:
            try:
                for root in (self.root, snapshots_beside(self.root)):
                    remove_leftovers(root)
                self._retire(facts)  # what was not proven at the last save may be now
                free = shutil.disk_usage(self.root).free
                if free < 1.02 * needed:
                    problem = f"{self.root}: no room, need {needed:,} bytes, have {free:,}; free some, or train.keep=1"
                else:
                    for destination in destinations:
                        destination.staging.mkdir(parents=True)
            except OSError as error:
                problem = f"{error.filename or self.root}: {error.strerror}"
        problem = broadcast_from_rank0(problem)
        if problem:  # a save that has begun is no success yet
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

    def _write(self, destinations: list[Destination], state: LocalState, facts: dict[str, Any]) -> None:
        """In the thread. One destination that fails does not keep the others from being written."""
        start = time.perf_counter()
        problems = [self._write_to(destination, state, facts) for destination in destinations]
        self.figures["save_seconds"] = time.perf_counter() - start
        self._problem = "; ".join(problem for problem in problems if problem)

    def _write_to(self, to: Destination, state: LocalState, facts: dict[str, Any]) -> str:
        """What went wrong, or "". What goes wrong on any rank is told by its receipt and remembered by rank 0."""
        rank, world = this_rank(), world_size()
        try:
            problem = write_rank(to.staging, rank, state.of_kinds(to.kinds).tensors, state.parts, facts["step"])
            if rank == 0:
                commit(to.staging, to.final, world, facts | to.facts, self.patience)
                problem = ""
                if to.kinds == KINDS:
                    self._retire(facts)
        except Exception as error:  # of any kind: an exception that ends a thread is seen by nobody
            unexpected = not isinstance(error, CheckpointError | OSError)
            logger.debug("the save of step %d failed", facts["step"], exc_info=unexpected)
            problem = f"{type(error).__name__}: {error}" if unexpected else str(error)
        return problem

    def _retire(self, facts: Mapping[str, Any]) -> None:
        t = self.engine.config.train
        run, step, updates = facts.get("run"), facts["step"], facts["updates"]
        retire(self.root, run, step, updates, t.keep, t.keep_every, t.max_bad_steps)


@dataclass
class Resumed:
    """The checkpoint that a run was filled from, and the newer ones that were not, each with what is wrong with it."""

    checkpoint: Checkpoint
    damaged: dict[int, str] = field(default_factory=dict)


def resume(
    root: Path,
    engine: Engine,
    ema: EMA,
    step: int | None = None,
    accept: Callable[[Path, Mapping[str, Any]], None] | None = None,
) -> Resumed | None:
    """Loads the newest checkpoint that is whole, or exactly that of `step`; None if there is none. Collective.

    Args:
        accept: raises OtherRun for the folder and manifest of a whole checkpoint that is not to be used.

    Damaged ones are named in the log and passed over, unless `step` asked for one. Raises CheckpointError on every
    rank: `step` is not there or damaged, or the checkpoint is of another model or run; nothing is changed then.
    """
    steps, incomplete = broadcast_from_rank0((steps_in(root), folders_without_manifest(root)))  # one view of the folder
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
            if accept:
                accept(checkpoint.folder, checkpoint.manifest)
            checkpoint.verify(this_rank(), world_size())
        except (OtherModel, OtherRun):
            raise  # every rank reads the same manifest
        except CheckpointError as error:
            problem = str(error)
        damage = "; ".join(dict.fromkeys(p for p in all_gather_values(problem) if p))
        if not damage:
            assert checkpoint is not None  # no rank had a problem, so this one has read it
            updates = int(checkpoint.manifest["updates"])
            restore(engine, ema, checkpoint.logical, checkpoint.buffer, updates)
            return Resumed(checkpoint, damaged)
        if step is not None:
            raise CheckpointError(damage)
        logger.warning("passing over a damaged checkpoint: %s", damage)
        damaged[candidate] = damage
    if steps:
        raise CheckpointError(f"{root}: none of the checkpoints {steps} is whole; move them away to start anew")
    if folders := broadcast_from_rank0(_step_folders(root)):
        names = ", ".join(folder.name for folder in folders[:8])
        raise CheckpointError(
            f"{root}: holds {names}, none a whole checkpoint of its step; move them away to start anew"
        )
    return None


def _step_folders(root: Path) -> list[Path]:
    """The folders under `root` that are named as checkpoints."""
    folders = root.iterdir() if root.is_dir() else ()
    return sorted(folder for folder in folders if FOLDER.fullmatch(folder.name))


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
    for piece, tensors in held_pieces(engine, ema):
        targets.setdefault(piece.name, []).append((piece, tensors))
    for name, held in targets.items():
        watchdog.touch()
        for kind in KINDS:
            local = engine.layouts[name].local_shard(logical(kind, name), engine.mesh).view(-1)
            for piece, tensors in held:
                tensors[kind].copy_(local[piece.start : piece.stop])
    for name, tensor in engine.module.state_dict().items():
        if name not in engine.layouts:
            tensor.copy_(buffer(name))
    engine.sync_parameters_from_masters()
    engine.set_optimizer_step(updates)
