"""Branches: what a run that goes back to an earlier step leaves behind is kept, apart from what it does next.

`checkpoints/` and metrics.jsonl hold one history, that of the branch that runs. A start that goes back, because of
`--step` or because newer checkpoints are damaged, moves all later ones to a folder of `branches/`:

====================  ===============================================================
branch.json           the branch that was left, after which step, when and why
checkpoints/          its checkpoints of later steps
snapshots/            its snapshots of later steps
metrics.jsonl         its lines of later steps
samples/              its pictures of later steps
tensorboard/          a copy of all events up to then
====================  ===============================================================

A branch folder with its branch.json gets its name before anything is moved to it, so whatever a kill interrupts, the
next start completes. Only what is named `.writing`, and holds copies alone, is removed.
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

FACTS = "branch.json"
MOVED = ".moved"  # a file: all of the branch was moved, and what is in `checkpoints/` now came later
_PICTURE = re.compile(r"step-(\d+)(?:-[0-9a-f]+)?\.png")  # of the training, or of `megapromoe sample`
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Start:
    """Where a start of a run begins.

    Attributes:
        step: of the checkpoint to begin from; None: the newest that is whole.
        branch: name of the branch that it continues or begins; None: that of the checkpoint.
        note: a sentence on why it does not begin at the step that was asked for, or "".
    """

    step: int | None = None
    branch: str | None = None
    note: str = ""


@dataclass(frozen=True)
class LeftBranch:
    """A branch that a run has left, see `RunDirectory.branches`.

    Attributes:
        name: of the branch.
        after: the step that the run went back to.
        steps: of the checkpoints that were moved, ascending.
        reason: why it was left.
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
    """What `--step` and `--fork` mean for a run as it is now.

    A step is asked for once: as soon as the branch that begins there has a checkpoint, the same command continues it.

    Args:
        fork: a name for a branch that begins at `step`; without one it is called after the step.

    Raises CheckpointError if there is no such checkpoint, or the name is taken or is none.
    """
    if step is None:
        if fork is not None:
            raise CheckpointError("--fork begins a branch at an earlier step: say which with --step N")
        return Start()
    if fork is not None and not _NAME.fullmatch(fork):
        raise CheckpointError(f"--fork {fork!r}: a name has letters, digits, '.', '_' and '-', at most 64")
    name = f"step-{step}" if fork is None else fork
    folders = step_folders(run.checkpoints)
    newest = folders[-1] if folders else None
    if newest and newest.branch == name and newest.step > step:
        other = "--fork NAME begins another one at that step"
        return Start(None, name, f"--step {step}: branch {name!r} has begun there and is continued; {other}")
    if fork is not None and (fork in (MAIN, *(one.name for one in left_branches(run)), newest and newest.branch)):
        raise CheckpointError(f"--fork {fork}: the run has, or had, a branch of that name; choose another")
    steps = [one.step for one in folders]
    if step not in steps:
        elsewhere = [f"{one.folder} has it" for one in left_branches(run) if step in one.steps]
        there = ", ".join(map(str, steps)) or "none"
        listed = "; ".join([f"there are {there}", *elsewhere])
        raise CheckpointError(f"{run.checkpoints}: has no complete checkpoint of step {step}; {listed}")
    return Start(step, name)


def progress(run: RunDirectory, step: int | None = None, fork: str | None = None) -> str:
    """In words, where a start would begin and what it would leave behind. Raises CheckpointError as `plan_start`."""
    start = plan_start(run, step, fork)
    folders = step_folders(run.checkpoints)
    if not folders:
        return "has no checkpoint yet, starts from step 0"
    if start.step is None:
        continued = f"continues from {folders[-1].folder.name}, branch {start.branch or folders[-1].branch!r}"
        return f"{continued} ({start.note})" if start.note else continued
    later = ", ".join(str(one.step) for one in folders if one.step > start.step)
    moved = f"; its checkpoints of steps {later} would move to {run.branches}" if later else ""
    return f"begins branch {start.branch!r} at {folder_of(run.checkpoints, start.step).name}{moved}"


def first_step(run: RunDirectory, step: int | None = None, fork: str | None = None) -> int:
    """The step of the checkpoint that a start would begin from, 0 without one. Raises as `plan_start`."""
    start = plan_start(run, step, fork)
    folders = step_folders(run.checkpoints)
    return folders[-1].step if start.step is None and folders else start.step or 0


def left_branches(run: RunDirectory) -> list[LeftBranch]:
    """The branches that a run has left, oldest first; one whose branch.json cannot be read is named in the log."""
    branches = []
    for file in run.branches.glob(f"*/{FACTS}"):
        if file.parent.name.endswith(SUFFIX):
            continue  # not finished, and nothing was moved
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
            facts |= {"folder": file.parent, "steps": tuple(facts["steps"])}
            branches.append(LeftBranch(**facts | {"snapshots": tuple(facts.get("snapshots", ()))}))
        except (OSError, ValueError, TypeError, KeyError):
            logger.warning("%s: is damaged; the branch is not listed, what its folder holds stays", file)
    return sorted(branches, key=lambda one: (one.left, one.folder.name))


def leave_branch(run: RunDirectory, after: int, reason: str, asked: bool = False) -> LeftBranch | None:
    """Moves what a run has of steps later than `after` to a branch folder; None if it has no later checkpoint.

    Args:
        asked: the start was asked to go back, so that later snapshots alone are a branch too.

    Called by the process that owns the run, before it writes. Raises OSError.
    """
    later = [one for one in step_folders(run.checkpoints) if one.step > after]
    snapshots = tuple(step for step in snapshot_steps(run.snapshots) if step > after)
    if not later and not (asked and snapshots):
        return None
    names = [one.branch for one in reversed(later) if one.updates is not None]
    names += [name for step in reversed(snapshots) if (name := branch_of(snapshot_of(run.snapshots, step)))]
    name = next(iter(names), MAIN)
    folder = _free_folder(run.branches, f"{name}-after-{after}")
    staging = staging_path(folder)
    staging.mkdir(parents=True)
    if run.metrics.exists():
        write_text(staging / run.metrics.name, "".join(_lines_after(run.metrics, after)))
    if run.tensorboard.exists():
        shutil.copytree(run.tensorboard, staging / run.tensorboard.name)
    steps, left = tuple(one.step for one in later), datetime.now(UTC).isoformat(timespec="seconds")
    branch = LeftBranch(folder, name, after, steps, reason, left, snapshots)
    write_json(staging / FACTS, {key: value for key, value in asdict(branch).items() if key != "folder"}, indent=2)
    os.rename(staging, folder)
    _move(run, branch)
    return branch


def complete_moves(run: RunDirectory) -> None:
    """Completes what a kill interrupted in `leave_branch`. Raises OSError."""
    for staging in run.branches.glob(f"*{SUFFIX}"):
        if not staging.is_symlink():
            shutil.rmtree(staging)  # copies; nothing was moved yet
    for branch in left_branches(run):
        _move(run, branch)


def _move(run: RunDirectory, branch: LeftBranch) -> None:
    """The newest first, so that `checkpoints/` holds one history without a gap at any instant."""
    checkpoints, samples = branch.folder / run.checkpoints.name, branch.folder / run.samples.name
    if (branch.folder / MOVED).exists():
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
    (branch.folder / MOVED).touch()


def _lines_after(file: Path, step: int) -> list[str]:
    lines = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            entry: Any = json.loads(line)
            if entry["step"] > step:
                lines.append(line)
        except (ValueError, TypeError, KeyError):
            continue  # metrics.py names such lines when it drops them
    return lines


def _free_folder(root: Path, name: str) -> Path:
    folder, number = root / name, 2
    while folder.exists():
        folder, number = root / f"{name}-{number}", number + 1
    return folder
