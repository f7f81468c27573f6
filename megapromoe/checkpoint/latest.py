"""The latest checkpoint of a run that may be live, and then removes old checkpoints while they are read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megapromoe.checkpoint.manifest import FOLDER, MANIFEST, CheckpointError
from megapromoe.checkpoint.step_folders import choose_checkpoint
from megapromoe.errors import UserError

logger = logging.getLogger(__name__)

TRIES = 5  # to read a latest checkpoint before it is removed

T = TypeVar("T")


def read_latest(root: Path, step: int | None, read: Callable[[int], T]) -> T:
    """`read(step)`; without a step, of the newest checkpoint.

    Where a newest checkpoint is removed by its run while it is read, the one that is newest then is read instead. A
    checkpoint that is still there and cannot be read is damaged, and no other one stands for it.

    Args:
        root: the folder of checkpoints.
        step: of a checkpoint.
        read: called with the step that was chosen. May be called again after an error, so it keeps nothing of it.

    Raises what `read` raises; CheckpointError if `root` has no checkpoint, or if the newest one was removed in each of
    `TRIES` tries.
    """
    if step is not None:
        return read(step)
    for attempt in range(1, TRIES + 1):
        try:
            folder = choose_checkpoint(root)
        except (UserError, OSError):
            # A listing can miss the new checkpoint and have the old one, which is gone when it is looked at.
            if attempt < TRIES and root.is_dir() and any(FOLDER.fullmatch(path.name) for path in root.iterdir()):
                continue
            raise
        before = _identity(folder)
        try:
            return read(_step_of(folder))
        except (UserError, OSError):
            if before is not None and _identity(folder) == before:
                raise
            logger.warning("%s: was removed by its run while it was read; looking for the latest again", folder)
    raise gone_too_often(root)


def gone_too_often(root: Path) -> CheckpointError:
    """The error of a run whose newest checkpoint was removed in each of `TRIES` tries to read it."""
    return CheckpointError(
        f"{root}: {TRIES} times the newest checkpoint was removed by its run before it was read; give the step of one"
        " that stays (train.keep_every), or let the run keep more (train.keep)"
    )


def _step_of(folder: Path) -> int:
    name = FOLDER.fullmatch(folder.name)
    assert name is not None, f"{folder} was chosen as a checkpoint"
    return int(name[1])


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """Which checkpoint lies in a folder, None if it is none: a run may also save a step again."""
    try:
        status = (folder / MANIFEST).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns
