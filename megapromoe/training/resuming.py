"""Where a start of a run begins, and what a run that diverged can go back to."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megapromoe.checkpoint import history
from megapromoe.checkpoint.average import Average, average_at_start
from megapromoe.checkpoint.manager import resume
from megapromoe.checkpoint.manifest import CheckpointError
from megapromoe.checkpoint.origin import Origin
from megapromoe.checkpoint.retention import newest_proven
from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.checkpoint.snapshots import remove_later
from megapromoe.checkpoint.step_folders import MAIN, step_folders
from megapromoe.config.options import Config, TrainConfig
from megapromoe.distributed.agreement import broadcast_from_rank0, raising_together, this_rank
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.io import write_text
from megapromoe.training.progress import Progress

logger = logging.getLogger(__name__)


def plan_start(
    config: Config, run: RunDirectory, from_step: int | None, fork: str | None
) -> tuple[history.Start, Origin]:
    """Where the run begins, and of what origin its checkpoints must be, as rank 0 sees the folder. Collective.

    Raises CheckpointError on every rank, see `history.plan_start`.
    """
    planned = None
    with raising_together(CheckpointError):
        if this_rank() == 0:
            history.complete_moves(run)
            planned = history.plan_start(run, from_step, fork), run.origin(config)
            if planned[0].note:
                logger.info("%s", planned[0].note)
    planned = broadcast_from_rank0(planned)
    assert planned is not None  # rank 0 raised otherwise
    return planned


def fill(
    run: RunDirectory,
    engine: Engine,
    ema: EMA,
    start: history.Start,
    accept: Callable[[Path, Mapping[str, Any]], None],
) -> dict[str, Any]:
    """Fills a run's state from the checkpoint that it begins from; returns its manifest. Collective.

    The manifest of a run without a checkpoint has a step and a branch alone. What the run has of later steps is moved
    to a branch folder. Raises CheckpointError on every rank, see `manager.resume`.
    """
    resumed = resume(run.checkpoints, engine, ema, start.step, accept)
    if resumed is None:
        if this_rank() == 0:
            remove_later(run.checkpoints, 0)
        return {"step": 0, "branch": start.branch or MAIN}
    manifest = resumed.checkpoint.manifest
    _continue_average(ema, Average.of(manifest), engine.config.train)
    with raising_together(CheckpointError):
        if this_rank() == 0:
            reason = "; ".join(resumed.damaged.values()) or f"a start went back to step {manifest['step']}"
            if left := history.leave_branch(run, manifest["step"], reason, asked=start.step is not None):
                steps = ", ".join(map(str, sorted({*left.steps, *left.snapshots})))
                logger.warning("checkpoints of later steps (%s) and their log lines: see %s", steps, left.folder)
            remove_later(run.checkpoints, manifest["step"])
    logger.info("continuing from %s", resumed.checkpoint.folder)
    return {**manifest, "branch": start.branch or manifest.get("branch") or MAIN}


def _continue_average(ema: EMA, saved: Average, train: TrainConfig) -> None:
    average = average_at_start(saved, train)
    ema.continue_from(average.updates, bool(average.warmup))
    if average.warmup != train.ema_warmup:
        logger.info(
            "train.ema_warmup = %s: the average of this run began %s warm-up and goes on so; it is decided at the first"
            " start of a run",
            *(str(train.ema_warmup).lower(), "with" if average.warmup else "without"),
        )


def note_skipped(run: RunDirectory, config: Config, step: int, progress: Progress) -> str:
    """Why a run whose last steps were skipped ends at `step`, which is saved, and how to go on. Collective.

    It is written to the run directory too, so that launchers do not repeat what cannot go well.
    """
    message = ""
    if this_rank() == 0:
        message = _describe_skipped(run, config, step, progress)
        try:
            write_text(run.diverged, message + "\n")
        except OSError as error:
            logger.warning("%s: cannot be written: %s", run.diverged, error.strerror)
    return broadcast_from_rank0(message)  # after the file: the first rank that ends may end the job


def _describe_skipped(run: RunDirectory, config: Config, step: int, progress: Progress) -> str:
    t, count = config.train, progress.skipped_in_a_row
    saved = f"what is saved as step {step} is the state after the last of {progress.updates} updates"
    if not progress.diverged:
        last = "the last step" if count == 1 else f"the last {count} steps"
        return f"step {step}: the run is at its end, but {last} had no usable gradient and changed nothing; {saved}"
    own = [one for one in step_folders(run.checkpoints) if one.run == run.identity()]
    proven = newest_proven(own, progress.updates, t.max_bad_steps)
    if proven:
        folder = shlex.quote(str(run.folder))
        command = f"megapromoe train --config {shlex.quote(str(run.config_file))} --run {folder}"
        advice = (
            f"After the checkpoint of step {proven.step} further updates went well. Go back to it with a lower"
            f" train.lr or train.clip:\n  {command} --step {proven.step} train.lr={t.lr / 3:.3g}"
        )
    else:
        advice = (
            f"No checkpoint has {t.max_bad_steps} applied updates after it, so none is known to be good: start a"
            " new run, with another --run and a lower train.lr or train.clip"
        )
    return (
        f"step {step}: {t.max_bad_steps} steps in a row without a usable gradient (train.max_bad_steps); {saved}, from"
        f" which repeating the command goes on, behind the samples named in the warnings. {advice}"
    )
