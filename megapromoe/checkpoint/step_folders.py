"""The step folders of a run: their names, and which of them are checkpoints. No torch."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path

from megapromoe.checkpoint.manifest import FOLDER, MANIFEST, SNAPSHOT_FOLDER, CheckpointError, read_summary

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
        if isinstance(described, str):
            logger.warning("%s: %s", folder, described)
        else:
            folders.append(described)
    return sorted(folders, key=lambda one: one.step)


def steps_in(root: Path) -> list[int]:
    """Steps of `step_folders`."""
    return [one.step for one in step_folders(root)]


def folders_without_manifest(root: Path) -> list[Path]:
    """The folders under `root` that are named as checkpoints and have no manifest, by ascending step.

    Neither a save nor a removal leaves one: their folders have other names while files come or go.
    """
    folders = sorted(folder for folder in (root.iterdir() if root.is_dir() else ()) if FOLDER.fullmatch(folder.name))
    return [folder for folder in folders if folder.is_dir() and not (folder / MANIFEST).exists()]


def warn_without_manifest(folders: list[Path]) -> None:
    """Logs folders of `folders_without_manifest`: whoever expects their steps is to know why others are read."""
    for folder in folders:
        logger.warning("%s: has no manifest.json, so it is no checkpoint; bring the file back, or remove it", folder)


def snapshots_beside(checkpoints: Path) -> Path:
    """The folder of a run's snapshots."""
    return checkpoints.with_name("snapshots")


def snapshot_of(root: Path, step: int) -> Path:
    """Where the snapshot of a step lies."""
    return root / f"average-{step:08d}"


def snapshot_steps(root: Path) -> list[int]:
    """Steps of the complete snapshots under `root`, ascending."""
    if not root.is_dir():
        return []
    steps = []
    for folder in root.iterdir():
        if (name := SNAPSHOT_FOLDER.fullmatch(folder.name)) and (folder / MANIFEST).is_file():
            steps.append(int(name[1]))
    return sorted(steps)


def choose_checkpoint(root: Path, step: int | None = None) -> Path:
    """The folder of the checkpoint of a step, or of the newest. Raises CheckpointError if `root` has none such.

    Logs a warning for each folder of a later step that has no manifest.
    """
    steps, snapshots = steps_in(root), ", ".join(map(str, snapshot_steps(snapshots_beside(root))))
    hint = f"; there are snapshots of the averaged weights, --weights ema, of steps {snapshots}" if snapshots else ""
    if not steps:
        raise CheckpointError(f"{root}: holds no complete checkpoint; train until train.save_every at least{hint}")
    if step is not None and step not in steps:
        raise CheckpointError(
            f"step = {step}: {root} has no such checkpoint; there are {', '.join(map(str, steps))}{hint}"
        )
    if step is None:
        newest = folder_of(root, steps[-1])
        warn_without_manifest([folder for folder in folders_without_manifest(root) if folder.name > newest.name])
        return newest
    return folder_of(root, step)


@functools.lru_cache(maxsize=1024)
def _describe(folder: Path, written: int, size: int) -> StepFolder | str:
    """Why a folder is no checkpoint, for one of another step than its name's, or of averages alone.

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
        return "is a copy of another step, and no checkpoint of this one; remove it"
    if not summary.complete:
        return "is a snapshot of averaged weights, from which no run goes on; move it to snapshots/average-XXXXXXXX"
    return StepFolder(folder, step, summary.updates, summary.run, summary.branch or MAIN)
