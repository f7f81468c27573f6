"""The step folders of a run: their names, and which of them are checkpoints. No torch."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path

from megapromoe.checkpoint.manifest import FOLDER, MANIFEST, CheckpointError, read_summary

logger = logging.getLogger(__name__)

MAIN = "main"
"""Name of a run's first branch."""


@dataclass(frozen=True)
class StepFolder:
    """A checkpoint as its folder's name and its manifest describe it; its files are not looked at.

    Attributes:
        step: of the folder's name.
        updates: optimizer steps that were applied; None if the manifest cannot be read.
        run: identity of the run that wrote it, see `RunDirectory.identity`; None if it is of no run.
        branch: name of the run's branch that wrote it.
    """

    folder: Path
    step: int
    updates: int | None
    run: str | None = None
    branch: str = MAIN


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:08d}"


def step_folders(root: Path) -> list[StepFolder]:
    """The complete checkpoints under `root`, by ascending step. A folder named as another step is left out."""
    if not root.is_dir():
        return []
    folders = []
    for folder in root.iterdir():
        name, manifest = FOLDER.fullmatch(folder.name), folder / MANIFEST
        if not name or not manifest.is_file():
            continue
        try:
            status = manifest.stat()
        except FileNotFoundError:
            continue  # removed by its run since
        described = _describe(folder, status.st_mtime_ns, status.st_size)
        if described is None:
            logger.warning("%s: is a copy of another step, and no checkpoint of this one; remove it", folder)
        else:
            folders.append(described)
    return sorted(folders, key=lambda one: one.step)


def steps_in(root: Path) -> list[int]:
    """Steps of `step_folders`."""
    return [one.step for one in step_folders(root)]


def choose_checkpoint(root: Path, step: int | None = None) -> Path:
    """The folder of the checkpoint of a step, or of the newest. Raises CheckpointError if `root` has none such."""
    steps = steps_in(root)
    if not steps:
        raise CheckpointError(f"{root}: holds no complete checkpoint; train until train.save_every at least")
    if step is not None and step not in steps:
        raise CheckpointError(f"step = {step}: {root} has no such checkpoint; there are {', '.join(map(str, steps))}")
    return folder_of(root, steps[-1] if step is None else step)


@functools.lru_cache(maxsize=1024)
def _describe(folder: Path, written: int, size: int) -> StepFolder | None:
    """None for a folder that is named as another step than its manifest's.

    Remembered as long as the manifest's time and size stay: a long run asks at every save.
    """
    named = FOLDER.fullmatch(folder.name)
    assert named is not None  # the caller looked
    step = int(named[1])
    try:
        summary = read_summary(folder)
    except CheckpointError:
        return StepFolder(folder, step, None)  # damaged; whoever opens it says so
    if summary.step != step:
        return None
    return StepFolder(folder, step, summary.updates, summary.run, summary.branch or MAIN)
