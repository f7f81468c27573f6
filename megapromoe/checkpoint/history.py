"""Branches of a run: going back to an earlier step moves the later results to a folder of `branches/`.

`checkpoints/`, metrics.jsonl and routing_trace.jsonl always contain one history, that of the current branch. When a
start goes back, because of `--step` or because newer checkpoints are damaged, it moves everything of later steps to a
folder of `branches/`:

====================  ===============================================================
branch.json           name of the branch, the step it was left after, the time and the reason
checkpoints/          its checkpoints of later steps
snapshots/            its snapshots of later steps
metrics.jsonl         its log lines of later steps
routing_trace.jsonl   its records of routing of later steps
samples/              its pictures of later steps
tensorboard/          a copy of all event files at that time
====================  ===============================================================

The branch folder gets its final name, with branch.json in it, before anything is moved to it. So the next start can
complete moves that a kill interrupted. Folders that still end in `.writing` contain copies only, and are removed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megapromoe.checkpoint.manifest import CheckpointError
from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.checkpoint.snapshots import branch_of
from megapromoe.checkpoint.step_folders import MAIN, folder_of, snapshot_of, snapshot_steps, step_folders
from megapromoe.io import SUFFIX, staging_path, write_json, write_text

logger = logging.getLogger(__name__)

BRANCH_FILE = "branch.json"
MOVED_MARKER = ".moved"  # an empty file that marks a complete move; later checkpoints belong to another branch
_PICTURE = re.compile(r"step-(\d+)(?:-[0-9a-f]+)?\.png")  # written by training or by `megapromoe sample`
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Start:
    """The step and the branch from which a start continues.

    Attributes:
        step: step of the checkpoint to load; None: the newest undamaged one.
        branch: name of the branch to continue or to create; None: the branch of the checkpoint.
        note: a sentence that explains why the requested step is not used, or "".
    """

    step: int | None = None
    branch: str | None = None
    note: str = ""


@dataclass(frozen=True)
class LeftBranch:
    """A branch that a run has left; see `RunDirectory.branches`. Its fields are those of branch.json.

    Attributes:
        folder: the folder of the branch; not in branch.json.
        name: name of the branch.
        after: the step that the run went back to.
        steps: steps of the checkpoints that were moved, ascending.
        reason: why the run went back.
        left: time, ISO 8601.
        snapshots: steps of the snapshots that were moved, ascending.
    """

    folder: Path
    name: str
    after: int
    steps: tuple[int, ...]
    reason: str
    left: str
    snapshots: tuple[int, ...] = ()


def plan_start(run: RunDirectory, step: int | None = None, fork: str | None = None) -> Start:
    """Resolves `--step` and `--fork` for the current content of a run directory.

    The same command can be repeated: once the new branch has a checkpoint, the command continues that branch and does
    not go back again.

    Args:
        step: the step to go back to; None: continue from the newest checkpoint.
        fork: name of the new branch; None: `step-N`.

    Raises CheckpointError if the checkpoint does not exist, or the name is taken or invalid.
    """
    if step is None:
        if fork is not None:
            raise CheckpointError("--fork begins a branch at an earlier step: give that step with --step N")
        return Start()
    if fork is not None and not _NAME.fullmatch(fork):
        raise CheckpointError(f"--fork {fork!r}: a name has letters, digits, '.', '_' and '-', at most 64 of them")
    name = f"step-{step}" if fork is None else fork
    folders = step_folders(run.checkpoints)
    newest = folders[-1] if folders else None
    if newest and newest.branch == name and newest.step > step:
        other = "--fork NAME begins another branch at that step"
        return Start(None, name, f"--step {step}: branch {name!r} already begins there and is continued; {other}")
    if fork is not None and (fork in (MAIN, *(branch.name for branch in left_branches(run)), newest and newest.branch)):
        raise CheckpointError(f"--fork {fork}: the run has, or had, a branch of that name; choose another")
    steps = [folder.step for folder in folders]
    if step not in steps:
        elsewhere = [f"{branch.folder} has it" for branch in left_branches(run) if step in branch.steps]
        available = ", ".join(map(str, steps)) or "none"
        listed = "; ".join([f"there are {available}", *elsewhere])
        raise CheckpointError(f"{run.checkpoints}: has no complete checkpoint of step {step}; {listed}")
    return Start(step, name)


def progress(run: RunDirectory, step: int | None = None, fork: str | None = None) -> str:
    """Describes where a start would begin and what it would move to a branch folder. Raises as `plan_start`."""
    start = plan_start(run, step, fork)
    folders = step_folders(run.checkpoints)
    if not folders:
        return "has no checkpoint yet, starts from step 0"
    if start.step is None:
        continued = f"continues from {folders[-1].folder.name}, branch {start.branch or folders[-1].branch!r}"
        return f"{continued} ({start.note})" if start.note else continued
    later = ", ".join(str(folder.step) for folder in folders if folder.step > start.step)
    moved = f"; its checkpoints of steps {later} would move to {run.branches}" if later else ""
    return f"begins branch {start.branch!r} at {folder_of(run.checkpoints, start.step).name}{moved}"


def first_step(run: RunDirectory, step: int | None = None, fork: str | None = None) -> int:
    """The step of the checkpoint that a start would load, 0 if there is none. Raises as `plan_start`."""
    start = plan_start(run, step, fork)
    folders = step_folders(run.checkpoints)
    return folders[-1].step if start.step is None and folders else start.step or 0


def left_branches(run: RunDirectory) -> list[LeftBranch]:
    """The branches that a run has left, oldest first. A branch.json that cannot be read is logged and left out."""
    branches = []
    for file in run.branches.glob(f"*/{BRANCH_FILE}"):
        if file.parent.name.endswith(SUFFIX):
            continue  # incomplete: nothing was moved to it
        try:
            metadata = json.loads(file.read_text(encoding="utf-8"))
            metadata |= {"folder": file.parent, "steps": tuple(metadata["steps"])}
            branches.append(LeftBranch(**metadata | {"snapshots": tuple(metadata.get("snapshots", ()))}))
        except (OSError, ValueError, TypeError, KeyError):
            logger.warning("%s: is damaged; this branch is not listed, its folder is left as it is", file)
    return sorted(branches, key=lambda branch: (branch.left, branch.folder.name))


def leave_branch(run: RunDirectory, after: int, reason: str, requested: bool = False) -> LeftBranch | None:
    """Moves all results of steps later than `after` to a branch folder. Returns None if there are none.

    Called by the process that owns the run directory, before it writes.

    Args:
        after: the step that the run goes back to.
        reason: why, for branch.json.
        requested: the user gave `--step` to go back. Then later snapshots without a later checkpoint are moved too.

    Raises OSError.
    """
    later = [folder for folder in step_folders(run.checkpoints) if folder.step > after]
    snapshots = tuple(step for step in snapshot_steps(run.snapshots) if step > after)
    if not later and not (requested and snapshots):
        return None
    names = [checkpoint.branch for checkpoint in reversed(later) if checkpoint.updates is not None]
    names += [name for step in reversed(snapshots) if (name := branch_of(snapshot_of(run.snapshots, step)))]
    name = next(iter(names), MAIN)
    folder = _free_folder(run.branches, f"{name}-after-{after}")
    staging = staging_path(folder)
    staging.mkdir(parents=True)
    for log in (run.metrics, run.routing_trace):
        if log.exists():
            write_text(staging / log.name, "".join(_lines_after(log, after)))
    if run.tensorboard.exists():
        shutil.copytree(run.tensorboard, staging / run.tensorboard.name)
    steps, left = tuple(checkpoint.step for checkpoint in later), datetime.now(UTC).isoformat(timespec="seconds")
    branch = LeftBranch(folder, name, after, steps, reason, left, snapshots)
    write_json(
        staging / BRANCH_FILE, {key: value for key, value in asdict(branch).items() if key != "folder"}, indent=2
    )
    os.rename(staging, folder)
    _move(run, branch)
    return branch


def complete_moves(run: RunDirectory) -> None:
    """Completes the moves of a `leave_branch` that was interrupted by a kill. Raises OSError."""
    for staging in run.branches.glob(f"*{SUFFIX}"):
        if not staging.is_symlink():
            shutil.rmtree(staging)  # contains copies only
    for branch in left_branches(run):
        _move(run, branch)


def _move(run: RunDirectory, branch: LeftBranch) -> None:
    """Moves the newest first, so that the steps in `checkpoints/` have no gap at any time."""
    checkpoints, samples = branch.folder / run.checkpoints.name, branch.folder / run.samples.name
    if (branch.folder / MOVED_MARKER).exists():
        return
    checkpoints.mkdir(exist_ok=True)
    for step in sorted(branch.steps, reverse=True):
        source, target = folder_of(run.checkpoints, step), folder_of(checkpoints, step)
        if source.exists() and not target.exists():
            os.rename(source, target)
    snapshots = branch.folder / run.snapshots.name
    for step in sorted(branch.snapshots, reverse=True):
        source, target = snapshot_of(run.snapshots, step), snapshot_of(snapshots, step)
        if source.exists() and not target.exists():
            snapshots.mkdir(exist_ok=True)
            os.rename(source, target)
    for picture in run.samples.glob("step-*.png"):
        number = _PICTURE.match(picture.name)
        if number and int(number[1]) > branch.after:
            samples.mkdir(exist_ok=True)
            os.rename(picture, samples / picture.name)
    (branch.folder / MOVED_MARKER).touch()


def _lines_after(file: Path, step: int) -> list[str]:
    lines = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            entry: Any = json.loads(line)
            if entry["step"] > step:
                lines.append(line)
        except (ValueError, TypeError, KeyError):
            continue  # unreadable; `metrics.rewind` logs such lines when it drops them
    return lines


def _free_folder(root: Path, name: str) -> Path:
    folder, number = root / name, 2
    while folder.exists():
        folder, number = root / f"{name}-{number}", number + 1
    return folder
