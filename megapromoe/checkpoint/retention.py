"""Which checkpoints of a run are removed, and how.

The newest `keep` checkpoints are kept, those of steps that are multiples of `keep_every`, and one that a diverging run
can go back to: a checkpoint is *proven* once `train.max_bad_steps` further updates were applied to its weights. Being
saved is not enough: a run that diverges from the start still applies its first steps, with useless weights as result.

A removal renames the folder first. If it is killed, the rest does not look like a checkpoint, and the next save removes
it.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from megapromoe.checkpoint.step_folders import StepFolder, step_folders
from megapromoe.io import SUFFIX

logger = logging.getLogger(__name__)

REMOVED = ".removed"


def newest_proven(folders: Sequence[StepFolder], updates: int, needed: int) -> StepFolder | None:
    """The newest checkpoint after which at least `needed` further updates were applied; None if there is none.

    Args:
        folders: checkpoints by ascending step.
        updates: updates that the run has applied until now.
        needed: further updates that prove a checkpoint.
    """
    proven = [folder for folder in folders if folder.updates is not None and folder.updates <= updates - needed]
    return proven[-1] if proven else None


def removable(folders: Sequence[StepFolder], updates: int, keep: int, keep_every: int, needed: int) -> list[StepFolder]:
    """The checkpoints that can be removed.

    The newest proven checkpoint is kept, and the one after it, which is the next to be proven.

    Args:
        folders: checkpoints of this run up to now, by ascending step.
        updates: optimizer steps that the run has applied until now.
        keep: number of newest checkpoints to keep.
        keep_every: checkpoints of steps that are multiples of this are kept; 0: none.
        needed: further updates that prove a checkpoint.
    """
    kept = set(folders[-keep:])
    kept |= {folder for folder in folders if keep_every and folder.step % keep_every == 0}
    proven = newest_proven(folders, updates, needed)
    kept |= {proven} if proven else set()
    later = [folder for folder in folders if proven is None or folder.step > proven.step]
    return [folder for folder in folders if folder not in kept and folder not in later[:1]]


def prune(root: Path, run: str | None, step: int, updates: int, keep: int, keep_every: int, needed: int) -> None:
    """Removes the checkpoints that a run at `step` need not keep. Failures are logged and do not raise.

    Only checkpoints of this run and of steps up to `step` are counted or removed.

    Args:
        root: the folder of checkpoints.
        run: identity of the run.
        step: the current step.
        updates, keep, keep_every, needed: see `removable`.
    """
    candidates = [
        folder
        for folder in step_folders(root)
        if folder.step <= step and folder.run == run and folder.updates is not None
    ]
    for checkpoint in removable(candidates, updates, keep, keep_every, needed):
        remove(checkpoint.folder)


def remove(folder: Path) -> None:
    """Removes a checkpoint folder, or a symbolic link without its target. A failure is logged."""
    try:
        if folder.is_symlink():
            folder.unlink()
            return
        renamed = folder.with_name(folder.name + REMOVED)
        os.rename(folder, renamed)
        shutil.rmtree(renamed)
    except OSError as error:
        logger.warning("%s: cannot be removed: %s", error.filename or folder, error.strerror or error)


def remove_leftovers(root: Path) -> None:
    """Removes the incomplete folders of killed saves and killed removals, of checkpoints and of snapshots."""
    for name, suffix in product(("step", "average"), (SUFFIX, REMOVED)):
        for folder in root.glob(f"{name}-*{suffix}"):
            if not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)
