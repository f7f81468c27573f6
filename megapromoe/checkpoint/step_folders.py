"""The step folders of a run: their names, and which of them are checkpoints. Does not import torch."""

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
    """A checkpoint as described by its name and its manifest; its tensor files are not checked.

    Attributes:
        folder: the checkpoint folder.
        step: step in the name of the folder.
        updates: number of applied optimizer steps; None if the manifest cannot be read.
        run: identity of the run that wrote it, see `RunDirectory.identity`; None if it belongs to no run.
        branch: name of the branch that wrote it.
    """

    folder: Path
    step: int
    updates: int | None
    run: str | None = None
    branch: str = MAIN


def folder_of(root: Path, step: int) -> Path:
    """The path of the checkpoint of a step."""
    return root / f"step-{step:08d}"


def step_folders(root: Path) -> list[StepFolder]:
    """The complete checkpoints under `root`, by ascending step.

    A folder with the manifest of another step, or of a snapshot, is logged and left out.
    """
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
            continue  # removed by its run meanwhile
        described = _describe(folder, status.st_mtime_ns, status.st_size)
        if isinstance(described, str):
            logger.warning("%s: %s", folder, described)
        else:
            folders.append(described)
    return sorted(folders, key=lambda checkpoint: checkpoint.step)


def steps_in(root: Path) -> list[int]:
    """The steps of the complete checkpoints under `root`, ascending."""
    return [checkpoint.step for checkpoint in step_folders(root)]


def folders_without_manifest(root: Path) -> list[Path]:
    """The folders under `root` that have the name of a checkpoint but no manifest, by ascending step.

    Neither a save nor a removal creates one: both use another name while the folder is incomplete.
    """
    folders = sorted(folder for folder in (root.iterdir() if root.is_dir() else ()) if FOLDER.fullmatch(folder.name))
    return [folder for folder in folders if folder.is_dir() and not (folder / MANIFEST).exists()]


def warn_without_manifest(folders: list[Path]) -> None:
    """Logs a warning for each of `folders_without_manifest`, since the user may expect that their steps are read."""
    for folder in folders:
        logger.warning(
            "%s: has no manifest.json, so it is no checkpoint; restore the file, or remove the folder", folder
        )


def snapshots_beside(checkpoints: Path) -> Path:
    """The path of the folder of snapshots beside a folder of checkpoints."""
    return checkpoints.with_name("snapshots")


def snapshot_of(root: Path, step: int) -> Path:
    """The path of the snapshot of a step."""
    return root / f"average-{step:08d}"


def snapshot_steps(root: Path) -> list[int]:
    """The steps of the complete snapshots under `root`, ascending."""
    if not root.is_dir():
        return []
    steps = []
    for folder in root.iterdir():
        if (name := SNAPSHOT_FOLDER.fullmatch(folder.name)) and (folder / MANIFEST).is_file():
            steps.append(int(name[1]))
    return sorted(steps)


def choose_checkpoint(root: Path, step: int | None = None) -> Path:
    """The folder of the checkpoint of a step, or without a step of the newest checkpoint.

    For the newest, logs a warning for each folder of a later step that has no manifest.

    Raises CheckpointError if there is none.
    """
    steps, snapshots = steps_in(root), ", ".join(map(str, snapshot_steps(snapshots_beside(root))))
    hint = f"; there are snapshots of the averaged weights, --weights ema, of steps {snapshots}" if snapshots else ""
    if not steps:
        raise CheckpointError(f"{root}: holds no complete checkpoint; train for at least train.save_every steps{hint}")
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
    """The description of a checkpoint folder, or a sentence that explains why it is not a checkpoint of that step.

    Cached until the time or the size of the manifest changes: a long run lists its checkpoints at every save.

    Args:
        written: modification time of the manifest, nanoseconds.
        size: bytes of the manifest.
    """
    named = FOLDER.fullmatch(folder.name)
    assert named is not None  # `step_folders` has checked
    step = int(named[1])
    try:
        summary = read_summary(folder)
    except CheckpointError:
        return StepFolder(folder, step, None)  # damaged; opening it raises the reason
    if summary.step != step:
        return "is a copy of another step, and no checkpoint of this one; remove it"
    if not summary.complete:
        return (
            "is a snapshot of averaged weights, from which training cannot resume; move it to"
            " snapshots/average-XXXXXXXX"
        )
    return StepFolder(folder, step, summary.updates, summary.run, summary.branch or MAIN)
