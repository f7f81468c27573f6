"""`train --dry-run`: reports what a start of training would do, and all reasons for which it would be refused.

It opens the data like a start, but does not copy them to `data.cache`, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from megapromoe.checkpoint.history import first_step, progress
from megapromoe.checkpoint.manifest import CheckpointError
from megapromoe.checkpoint.run_directory import RunDirectory, RunDirectoryError, RunInUse
from megapromoe.checkpoint.step_folders import step_folders
from megapromoe.config.options import Config
from megapromoe.data.datasets import Dataset, DatasetError
from megapromoe.data.sources import open_captions, open_dataset, open_teacher_features
from megapromoe.diffusion.multistep import MethodUnavailable
from megapromoe.errors import ExitCode, UserError, Violations
from megapromoe.training.initializing import StartError, examine_start_from_weights
from megapromoe.training.preview import open_preview
from megapromoe.training.wandb_run import WandbUnavailable, check_installed


class StartRefused(Violations):
    """A start that would be refused; `violations` lists all reasons that a dry run can detect."""

    subject = "this start"
    exit_code = ExitCode.MISCONFIGURED


class Examined(NamedTuple):
    """What a dry run has found out."""

    state: str
    """What the start would do in the folder."""
    dataset: Dataset | None
    """None if it cannot be opened."""
    refused: StartRefused | None
    """The error with which the start would be refused."""
    initial: list[str]
    """Lines on the weights of `train.init_from`."""


def examine_start(
    config: Config,
    folder: Path,
    allow: Iterable[str] = (),
    from_step: int | None = None,
    fork: str | None = None,
) -> Examined:
    """Checks the run directory and the data of a start, without changing anything.

    Args:
        config: configuration of the start.
        folder: the run directory.
        allow, from_step, fork: see `loop.train`.

    """
    problems: list[UserError] = []
    run, dataset, state = RunDirectory(folder), None, "refused, see below"
    initial: list[str] = []
    try:
        begins = progress(run, from_step, fork)
        state = run.state(config, allow, begins, first_step(run, from_step, fork)).removeprefix(f"{folder}: ")
    except (RunDirectoryError, CheckpointError) as error:
        problems.append(error)
    if config.train.init_from and step_folders(run.checkpoints):
        initial = [f"not used, because the run resumes: train.init_from = {config.train.init_from}"]
    else:
        try:
            initial = examine_start_from_weights(config)
        except (UserError, OSError) as error:
            problems.append(error if isinstance(error, UserError) else StartError(f"{error}"))
    try:
        dataset = open_dataset(replace(config, data=replace(config.data, cache="")))
        open_teacher_features(config, dataset)
        open_preview(config, open_captions(config, dataset))
    except (DatasetError, MethodUnavailable) as error:
        problems.append(error)
    try:
        check_installed(config.train.wandb)
    except WandbUnavailable as error:
        problems.append(error)
    if not problems:
        return Examined(state, dataset, None, initial)
    refused = StartRefused(map(str, problems))
    refused.on_all_ranks = all(error.on_all_ranks for error in problems)
    if all(isinstance(error, RunInUse) for error in problems):
        refused.exit_code = ExitCode.FAILED  # another process may release the folder
    return Examined(state, dataset, refused, initial)
