"""Reading the latest checkpoint of a run that may still be training and removing old checkpoints meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megapromoe.checkpoint.manifest import FOLDER, MANIFEST, CheckpointError
from megapromoe.checkpoint.step_folders import choose_checkpoint
from megapromoe.errors import UserError

logger = logging.getLogger(__name__)

TRIES = 5  # attempts to read the latest checkpoint before the run removes it

T = TypeVar("T")


def read_latest(root: Path, step: int | None, read: Callable[[int], T]) -> T:
    """Returns `read(step)`, or without a step `read` of the newest checkpoint.

    If the run removes the newest checkpoint while it is read, the then newest one is read instead. If a checkpoint
    still exists and cannot be read, it is damaged, and the error is raised.

    Args:
        root: the folder of checkpoints.
        step: step of a checkpoint; None: the newest.
        read: called with the chosen step. It can be called again after an error, so it must not keep partial results.

    Raises what `read` raises; CheckpointError if `root` has no checkpoint, or if the newest one was removed in each of
    `TRIES` attempts.
    """
    if step is not None:
        return read(step)
    for attempt in range(1, TRIES + 1):
        try:
            folder = choose_checkpoint(root)
        except (UserError, OSError):
            # A listing can miss the new checkpoint and contain the old one, removed before its manifest is read.
            if attempt < TRIES and root.is_dir() and any(FOLDER.fullmatch(path.name) for path in root.iterdir()):
                continue
            raise
        before = _identity(folder)
        try:
            return read(_step_of(folder))
        except (UserError, OSError):
            if before is not None and _identity(folder) == before:
                raise
            logger.warning("%s: was removed by its run while it was read; trying the latest checkpoint again", folder)
    raise removed_too_often(root)


def removed_too_often(root: Path) -> CheckpointError:
    """The error for a run that removed its newest checkpoint in each of `TRIES` attempts to read it."""
    return CheckpointError(
        f"{root}: {TRIES} times the newest checkpoint was removed by its run before it was read; give the step of a"
        " checkpoint that is kept (train.keep_every), or let the run keep more (train.keep_last)"
    )


def _step_of(folder: Path) -> int:
    name = FOLDER.fullmatch(folder.name)
    assert name is not None, f"{folder} was chosen as a checkpoint"
    return int(name[1])


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """Identifies the checkpoint in a folder, since a run may save a step again; None if there is none."""
    try:
        status = (folder / MANIFEST).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns
