"""Snapshots: only the averaged weights of a step, for evaluating many steps. A quarter of the size of a checkpoint.

``snapshots/average-00001000/`` beside ``checkpoints/`` has the files and the manifest of a checkpoint, with the
averages alone, one for each of `train.ema_decay`. Training cannot resume from it: its name differs from that of a
checkpoint, and its manifest has the entry `kinds`, so it is refused even if it is renamed. Snapshots are never pruned.
A run directory contains snapshots of the current history only: when a start goes back to an earlier step, later
snapshots are moved to the branch folder, or removed if the same branch will repeat these steps.
"""

from __future__ import annotations

import logging
from pathlib import Path

from megapromoe.checkpoint.manifest import MANIFEST, CheckpointError, read_summary
from megapromoe.checkpoint.retention import remove
from megapromoe.checkpoint.step_folders import (
    choose_checkpoint,
    snapshot_of,
    snapshot_steps,
    snapshots_beside,
    steps_in,
)
from megapromoe.checkpoint.weights import is_average

logger = logging.getLogger(__name__)


def branch_of(folder: Path) -> str | None:
    """The branch that wrote a snapshot; None if its manifest does not name it or cannot be read."""
    try:
        return read_summary(folder).branch
    except CheckpointError:
        return None


def readable_steps(checkpoints: Path, weights: str) -> list[int]:
    """The steps for which a run has these weights, ascending.

    Args:
        checkpoints: the folder of checkpoints.
        weights: "master": steps of checkpoints; averaged weights: also steps of snapshots.
    """
    steps = set(steps_in(checkpoints))
    return sorted(steps | set(snapshot_steps(snapshots_beside(checkpoints))) if is_average(weights) else steps)


def choose_weights(checkpoints: Path, step: int | None, weights: str) -> Path:
    """The folder from which to read the weights of a step; without a step, of the newest checkpoint.

    For averaged weights a snapshot is preferred, because a run in training may remove the checkpoint meanwhile.

    Raises CheckpointError, which lists the existing steps, if there is none.
    """
    if step is not None and is_average(weights):
        snapshot = snapshot_of(snapshots_beside(checkpoints), step)
        if (snapshot / MANIFEST).is_file():
            return snapshot
    return choose_checkpoint(checkpoints, step)


def remove_later(checkpoints: Path, step: int) -> None:
    """Removes the snapshots of steps later than `step`, because the run repeats these steps."""
    root = snapshots_beside(checkpoints)
    later = [number for number in snapshot_steps(root) if number > step]
    for number in later:
        remove(snapshot_of(root, number))
    if later:
        logger.info("removed the snapshots of steps %s: the run repeats these steps", ", ".join(map(str, later)))
