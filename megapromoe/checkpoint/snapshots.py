"""Snapshots: the averaged weights of a step alone, a quarter of a checkpoint, for curves of an image metric over steps.

``snapshots/average-00001000/`` beside ``checkpoints/`` has a checkpoint's files and manifest with one kind of tensors.
It is no checkpoint: its name is another one, and its manifest says `kinds`, so that it is refused also under a
checkpoint's name. All are kept. A run holds snapshots of its own history alone: those of later steps than a start
begins from are moved to the branch that is left, or removed where the same branch does these steps again.
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

logger = logging.getLogger(__name__)

AVERAGES = ("ema",)
"""The kinds of tensors in a snapshot."""


def branch_of(folder: Path) -> str | None:
    """The branch that wrote a snapshot; None where its manifest does not say so."""
    try:
        return read_summary(folder).branch
    except CheckpointError:
        return None


def readable_steps(checkpoints: Path, weights: str) -> list[int]:
    """Steps of which a run has these weights, ascending: of its checkpoints and, of averages, of its snapshots."""
    steps = set(steps_in(checkpoints))
    return sorted(steps | set(snapshot_steps(snapshots_beside(checkpoints))) if weights == "ema" else steps)


def choose_weights(checkpoints: Path, step: int | None, weights: str) -> Path:
    """The folder from which to read weights of a step; without one, of the newest checkpoint.

    Of averages it is a snapshot where there is one: it stays, while a live run removes checkpoints.

    Raises CheckpointError if there is none, saying which steps there are.
    """
    if step is not None and weights == "ema":
        snapshot = snapshot_of(snapshots_beside(checkpoints), step)
        if (snapshot / MANIFEST).is_file():
            return snapshot
    return choose_checkpoint(checkpoints, step)


def remove_later(checkpoints: Path, step: int) -> None:
    """Removes snapshots of later steps than `step`, which the run does again from there."""
    root = snapshots_beside(checkpoints)
    later = [one for one in snapshot_steps(root) if one > step]
    for one in later:
        remove(snapshot_of(root, one))
    if later:
        logger.info("snapshots of steps %s were removed: the run does them again", ", ".join(map(str, later)))
