"""The beginning of a start: which checkpoint it loads. And the advice for a run that diverged."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megapromoe.checkpoint import history
from megapromoe.checkpoint.average import Average, averages_at_start, averages_of, ended_averages
from megapromoe.checkpoint.manager import resume
from megapromoe.checkpoint.manifest import CheckpointError
from megapromoe.checkpoint.origin import Origin
from megapromoe.checkpoint.retention import newest_proven
from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.checkpoint.snapshots import remove_later
from megapromoe.checkpoint.step_folders import MAIN, step_folders
from megapromoe.checkpoint.weights import MASTER
from megapromoe.config.options import Config
from megapromoe.config.train_options import TrainConfig
from megapromoe.distributed.agreement import broadcast_from_rank0, raising_together, this_rank
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.io import write_text
from megapromoe.training.step_tracker import StepTracker

logger = logging.getLogger(__name__)


def plan_start(
    config: Config, run: RunDirectory, from_step: int | None, fork: str | None
) -> tuple[history.Start, Origin]:
    """Where the run begins, and the origin that its checkpoints must have, determined by rank 0. Collective.

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


def restore_run(
    run: RunDirectory,
    engine: Engine,
    ema: EMA,
    start: history.Start,
    accept: Callable[[Path, Mapping[str, Any]], None],
) -> dict[str, Any] | None:
    """Restores the training state from the checkpoint that the start begins from. Collective.

    Results of later steps are moved to a branch folder, see `history.leave_branch`.

    Args:
        accept: see `manager.resume`.

    Returns:
        the manifest of the checkpoint, with the branch that the start continues; None without a checkpoint.

    Raises CheckpointError on every rank, see `manager.resume`.
    """
    resumed = resume(run.checkpoints, engine, ema, start.step, accept)
    if resumed is None:
        if this_rank() == 0:
            remove_later(run.checkpoints, 0)
        return None
    manifest = resumed.checkpoint.manifest
    _continue_averages(ema, averages_of(manifest), engine.config.train)
    with raising_together(CheckpointError):
        if this_rank() == 0:
            reason = "; ".join(resumed.damaged.values()) or f"a start went back to step {manifest['step']}"
            if left := history.leave_branch(run, manifest["step"], reason, requested=start.step is not None):
                steps = ", ".join(map(str, sorted({*left.steps, *left.snapshots})))
                logger.warning(
                    "moved the checkpoints of later steps (%s) and their log lines to %s", steps, left.folder
                )
            remove_later(run.checkpoints, manifest["step"])
    logger.info("continuing from %s", resumed.checkpoint.folder)
    return {**manifest, "branch": start.branch or manifest.get("branch") or MAIN}


def _continue_averages(ema: EMA, saved: Sequence[Average], train: TrainConfig) -> None:
    """Sets the numbers of updates and the warm-up. Logs averages that begin or end, and a warm-up that is ignored."""
    starts = averages_at_start(saved, train)
    warmup = bool(starts[0].average.warmup)
    ema.continue_from([start.average.updates for start in starts], warmup)
    begun = [start.average for start in starts if start.source == MASTER]
    if this_rank() == 0:
        for average in begun:
            logger.info("train.ema_decay: the average of decay %g begins at the current weights", average.decay)
        for average in ended_averages(saved, train):
            logger.warning(
                "train.ema_decay: the average of decay %g ends; later checkpoints will not contain it", average.decay
            )
    if warmup != train.ema_warmup:
        logger.info(
            "train.ema_warmup = %s: ignored; the average of this run began %s warm-up, which cannot change after the"
            " first start of a run",
            *(str(train.ema_warmup).lower(), "with" if warmup else "without"),
        )


def report_skipped_steps(run: RunDirectory, config: Config, step: int, tracker: StepTracker) -> str:
    """Explains why a run ends at `step`, which is saved, if its last steps were skipped, with a remedy. Collective.

    The message is also written to diverged.txt of the run directory, so that launchers do not repeat the command.
    """
    message = ""
    if this_rank() == 0:
        message = _describe_skipped(run, config, step, tracker)
        try:
            write_text(run.diverged, message + "\n")
        except OSError as error:
            logger.warning("%s: cannot be written: %s", run.diverged, error.strerror)
    return broadcast_from_rank0(message)  # after writing: once a rank exits, the launcher may kill rank 0


def _describe_skipped(run: RunDirectory, config: Config, step: int, tracker: StepTracker) -> str:
    t, count = config.train, tracker.skipped_in_a_row
    saved = f"the saved state of step {step} is that after the last of {tracker.updates} updates"
    if not tracker.diverged:
        last = "the last step" if count == 1 else f"the last {count} steps"
        return f"step {step}: the run is complete, but {last} had no usable gradient and changed nothing; {saved}"
    checkpoints = [folder for folder in step_folders(run.checkpoints) if folder.run == run.identity()]
    proven = newest_proven(checkpoints, tracker.updates, t.max_bad_steps)
    if proven:
        folder = shlex.quote(str(run.folder))
        command = f"megapromoe train --config {shlex.quote(str(run.config_file))} --run-dir {folder}"
        advice = (
            f"At least {t.max_bad_steps} updates were applied after the checkpoint of step {proven.step}. Go back to it"
            f" with a lower train.lr or train.max_grad_norm:\n  {command} --step {proven.step} train.lr={t.lr / 3:.3g}"
        )
    else:
        advice = (
            f"No checkpoint has {t.max_bad_steps} applied updates after it, so none is known to be good: start a"
            " new run, with another --run-dir and a lower train.lr or train.max_grad_norm"
        )
    return (
        f"step {step}: {t.max_bad_steps} steps in a row without a usable gradient (train.max_bad_steps); {saved}."
        f" Repeating the command continues from it, after the samples named in the warnings. {advice}"
    )
