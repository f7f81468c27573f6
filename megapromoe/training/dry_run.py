"""`train --dry-run`: reports what a start of training would do, and all reasons for which it would be refused.

It opens the data like a start, but does not copy them to `data.cache`, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from megapromoe.checkpoint.history import first_step, progress
from megapromoe.checkpoint.manifest import CheckpointError
from megapromoe.checkpoint.run_directory import RunDirectory, RunDirectoryError, RunInUse
from megapromoe.config.options import Config
from megapromoe.data.datasets import Dataset, DatasetError
from megapromoe.data.sources import open_captions, open_dataset
from megapromoe.diffusion.multistep import MethodUnavailable
from megapromoe.errors import ExitCode, UserError, Violations
from megapromoe.training.preview import open_preview
from megapromoe.training.wandb_run import WandbUnavailable, check_installed


class StartRefused(Violations):
    """A start that would be refused; `violations` lists all reasons that a dry run can detect."""

    subject = "this start"
    exit_code = ExitCode.MISCONFIGURED


def examine_start(
    config: Config,
    folder: Path,
    allow: Iterable[str] = (),
    from_step: int | None = None,
    fork: str | None = None,
) -> tuple[str, Dataset | None, StartRefused | None]:
    """Checks the run directory and the data of a start, without changing anything.

    Args:
        config: configuration of the start.
        folder: the run directory.
        allow, from_step, fork: see `loop.train`.

    Returns:
        a description of what the start would do in the folder; the data set, None if it cannot be opened; the error
        with which the start would be refused, None if it would not.
    """
    problems: list[UserError] = []
    run, dataset, state = RunDirectory(folder), None, "refused, see below"
    try:
        begins = progress(run, from_step, fork)
        state = run.state(config, allow, begins, first_step(run, from_step, fork)).removeprefix(f"{folder}: ")
    except (RunDirectoryError, CheckpointError) as error:
        problems.append(error)
    try:
        dataset = open_dataset(replace(config, data=replace(config.data, cache="")))
        open_preview(config, open_captions(config, dataset))
    except (DatasetError, MethodUnavailable) as error:
        problems.append(error)
    try:
        check_installed(config.train.wandb)
    except WandbUnavailable as error:
        problems.append(error)
    if not problems:
        return state, dataset, None
    refused = StartRefused(map(str, problems))
    refused.on_all_ranks = all(error.on_all_ranks for error in problems)
    if all(isinstance(error, RunInUse) for error in problems):
        refused.exit_code = ExitCode.FAILED  # another process may release the folder
    return state, dataset, refused
