"""Which checkpoints of a run are removed, and how.

Kept are the newest `keep`, those of steps that `keep_every` divides, and what a run that diverges can go back to: a
checkpoint is *proven* once a number of further updates were applied to its weights. The first steps of a run that
diverges from the start are applied and finite, but what they leave is of no use.

A removal renames the folder first: what a kill leaves is recognised, is no checkpoint, and is removed by the next save.
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
    """The newest of `folders`, by ascending step, after which at least `needed` of a run's `updates` were applied."""
    proven = [one for one in folders if one.updates is not None and one.updates <= updates - needed]
    return proven[-1] if proven else None


def removable(folders: Sequence[StepFolder], updates: int, keep: int, keep_every: int, needed: int) -> list[StepFolder]:
    """Those that need not be kept.

    Args:
        folders: the run's own checkpoints up to now, by ascending step.
        updates: optimizer steps that the run has applied until now.
        keep: how many of the newest stay.
        keep_every: those of steps that this divides stay; 0: no more.
        needed: further updates that prove a checkpoint.

    The newest proven one stays, and the one after it: the next that will be proven.
    """
    kept = set(folders[-keep:])
    kept |= {one for one in folders if keep_every and one.step % keep_every == 0}
    proven = newest_proven(folders, updates, needed)
    kept |= {proven} if proven else set()
    later = [one for one in folders if proven is None or one.step > proven.step]
    return [one for one in folders if one not in kept and one not in later[:1]]


def retire(root: Path, run: str | None, step: int, updates: int, keep: int, keep_every: int, needed: int) -> None:
    """Removes what need not be kept of a run that has reached `step`; never raises: what cannot be removed is logged.

    Only checkpoints of this run (`run` is its identity) and not after `step` are counted or removed. For the other
    arguments see `removable`.
    """
    own = [one for one in step_folders(root) if one.step <= step and one.run == run and one.updates is not None]
    for one in removable(own, updates, keep, keep_every, needed):
        remove(one.folder)


def remove(folder: Path) -> None:
    """Removes a checkpoint's folder; of a symbolic link the link alone. A failure is logged."""
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
    """Removes what killed saves and killed removals left, of checkpoints and of snapshots."""
    for name, suffix in product(("step", "average"), (SUFFIX, REMOVED)):
        for left in root.glob(f"{name}-*{suffix}"):
            if not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
