"""The training run, top to bottom.

Repeating the command resumes: the newest checkpoint is loaded and the stream of samples goes on where it was, since the
state of the data is the number of steps done.
"""

from __future__ import annotations

import contextlib
import logging
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megapromoe.checkpoint.history import Start
from megapromoe.checkpoint.manager import CheckpointManager
from megapromoe.checkpoint.manifest import CheckpointError
from megapromoe.checkpoint.origin import Origin
from megapromoe.checkpoint.run_directory import RunDirectory, RunDirectoryError
from megapromoe.config.options import Config, to_dict
from megapromoe.config.schedule import describe_changes, learning_rate
from megapromoe.data.datasets import Dataset, DatasetError
from megapromoe.data.sample_stream import Batch, SampleStream, prefetch
from megapromoe.data.sources import open_dataset
from megapromoe.diffusion.image_grid import generate, grid, picture_scale
from megapromoe.diffusion.objectives import Objective, make_objective
from megapromoe.distributed import runtime, watchdog
from megapromoe.distributed.agreement import raise_if_any_rank_failed, raising_together, this_rank, watched_job
from megapromoe.distributed.mesh import make_mesh
from megapromoe.distributed.stop_requests import StopRequest, install_signal_handlers
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.errors import ExitCode, UserError, repeating_cannot_help
from megapromoe.nn.dit import AuxiliaryOutput
from megapromoe.nn.parallelize import build
from megapromoe.training.metric_accumulator import MetricAccumulator
from megapromoe.training.metrics import Metrics
from megapromoe.training.progress import Progress, SaveClock, largest_norm
from megapromoe.training.resuming import fill, note_skipped, plan_start
from megapromoe.training.run_clock import RunClock, elapsed_before
from megapromoe.training.summary import closing_lines, sample_command, summary
from megapromoe.versions import versions

logger = logging.getLogger(__name__)


class TrainingError(UserError):
    """A run that cannot go on."""

    on_all_ranks = True


class Interrupted(TrainingError):
    """A run that was asked to stop by a signal, and has saved."""

    exit_code = ExitCode.STOPPED


def train(
    config: Config,
    folder: Path,
    launch: runtime.LaunchEnvironment,
    from_step: int | None = None,
    allow: tuple[str, ...] = (),
    fork: str | None = None,
) -> None:
    """Trains to `train.steps` in the run directory `folder`, from its newest checkpoint if it has any. Collective.

    Args:
        from_step: go back to the checkpoint of this step instead, or not at all; see `history.plan_start`.
        allow: settings, such as "data.seed", that may differ from the run's, see `origin.FIXED`; "data" and
            "run" too.
        fork: name of the branch that begins at `from_step`.

    A request to stop to any rank (see `stop_requests`) ends the run after a step, with a checkpoint. Raises Interrupted
    then; RunDirectoryError, CheckpointError or TrainingError on every rank, each saying what to do.
    """
    records = folder / "flight_records"
    limits = config.train.timeout, config.train.step_timeout
    with install_signal_handlers(launch) as asked_to_stop, watched_job(launch, *limits, records) as job:
        watchdog.starting("opening the run directory")
        own = _claim_folder(config, folder, launch, allow)
        run = own or RunDirectory(folder)
        try:
            if own and job.device.type == "cuda":
                _make_folder(records)
            with repeating_cannot_help(CheckpointError):
                start, origin = plan_start(config, run, from_step, fork)
            _train(config, run, job, start, origin, allow, asked_to_stop)
        finally:
            if own:
                with contextlib.suppress(OSError):
                    records.rmdir()  # nothing hung, so it is empty
                own.close()


def _make_folder(records: Path) -> None:
    """The folder of NCCL's flight records, which a run can do without."""
    try:
        records.mkdir(exist_ok=True)
    except OSError as error:
        logger.warning("%s: cannot be made (%s); a hang will leave no flight records", records, error.strerror)


def _claim_folder(
    config: Config, folder: Path, launch: runtime.LaunchEnvironment, allow: tuple[str, ...]
) -> RunDirectory | None:
    """Rank 0 claims the folder, and returns it; where it may not, every rank raises the reason."""
    run = None
    with raising_together(RunDirectoryError):
        if launch.rank == 0:
            run = RunDirectory.claim(folder, config, launch.world, allow, launcher=launch.launcher)
    return run


def _record_start(run: RunDirectory) -> None:
    """Rank 0 writes config.yaml and the start's entry, once no rank can refuse the start any more. Collective."""
    raise_if_any_rank_failed(None, RunDirectoryError)  # a rank that failed before does not come here
    with raising_together(RunDirectoryError):
        if this_rank() == 0:
            run.record()


def _train(
    config: Config,
    run: RunDirectory,
    job: runtime.Job,
    start: Start,
    origin: Origin,
    allow: tuple[str, ...],
    asked_to_stop: StopRequest,
) -> None:
    t, device = config.train, job.device
    watchdog.starting("making the groups")
    mesh = make_mesh(config.parallel.tp, config.parallel.ep, config.parallel.expert_tp, t.timeout)
    watchdog.starting("opening the data")
    dataset = _open_dataset(config)
    loader = SampleStream(dataset, config.data.seed, config.data.label_drop, config.data.flip, config.model.null_class)
    watchdog.starting("building the model and its engine")
    engine = Engine(build(config, mesh, device), config, mesh)
    ema = EMA(engine, t.ema, t.ema_warmup)
    objective = make_objective(config)

    manager = CheckpointManager(
        run.checkpoints, engine, ema, commit_timeout=t.timeout / 2
    )  # the others wait for rank 0 in a collective
    watchdog.starting("reading the checkpoint", math.inf)  # its hashes are of all bytes
    with repeating_cannot_help(CheckpointError):
        manifest = fill(run, engine, ema, start, partial(origin.check, allow=allow))
    watchdog.starting("recording the start")
    _record_start(run)
    step = manifest["step"]
    if mesh.rank == 0:
        begins = f"resumes from step {step:,}" if step else "begins at step 0"
        for line in summary(config, mesh.world_size, run.folder, begins, dataset, runtime.describe_device(device)):
            logger.info("%s", line)
    for line in describe_changes(config, run.changed, step):  # rank 0 alone knows them, and it alone logs
        logger.info("changed since the last start: %s", line)
    if step >= t.steps:
        logger.info("%s: all %d steps are done; train.steps=N with a larger N trains on", run.folder, step)
        logger.info("next: %s", sample_command(config, run.folder))
        return

    stretches = (
        stretch
        for s in range(step, t.steps)
        for stretch in loader.micro_batches(s, mesh.dp.size, mesh.dp.rank, t.accumulation, t.global_batch)
    )
    batches = prefetch(loader, stretches, config.data.workers, pin=device.type == "cuda")
    # Rank 0 alone logs, and its metadata are those that are saved.
    before = elapsed_before(manifest, run.metrics, t.global_batch) if mesh.rank == 0 else 0.0
    clock = RunClock(before, step, t.steps)
    metrics = Metrics(run.folder, config, t.steps, step, enabled=mesh.rank == 0, clock=clock)
    window = MetricAccumulator(config, mesh, device)
    progress = Progress(t, manifest)
    save_clock = SaveClock(t.save_minutes, mesh.rank)
    compiling = watchdog.COMPILING if t.compile else 0.0  # the first step of this start alone
    asked_to_stop.steps_begin()
    try:
        while step < t.steps:
            loss = torch.zeros((), device=device)
            for micro in range(t.accumulation):
                watchdog.at(f"section 'data' of step {step + 1}")
                batch = next(batches).to(device)
                window.damaged += batch.damaged
                watchdog.at(f"section 'forward and backward' of step {step + 1}", compiling)
                loss += _micro_step(engine, objective, batch, window)
                if micro < t.accumulation - 1:
                    engine.finish_micro_step()
            rate = learning_rate(t, step)
            compiling = 0.0
            watchdog.at(f"section 'update' of step {step + 1}")
            max_norm = largest_norm(t.spike, progress.recent)
            result = engine.step(rate, loss, asked_to_stop(), max_norm, save_clock.due())
            window.end_step(result.applied_on_device)
            ema.update(result)
            step += 1
            progress.add(step, result)
            if step % t.log_every == 0 or step == t.steps:
                watchdog.at(f"section 'log' of step {step}")
                values, layers = window.close(result.norm, rate)
                metrics.log(step, values | manager.save_metrics, layers)
                manager.save_metrics = {}
            if t.sample_every and step % t.sample_every == 0:
                watchdog.at(f"section 'sample' of step {step}")
                with window.paused():
                    picture = _draw(engine, ema, config)
                    metrics.samples(step, picture)
                if mesh.rank == 0 and progress.average.has_initial_weights:
                    drawn = progress.average.in_words()
                    logger.warning("picture of step %d: drawn with the averaged weights, %s", step, drawn)
            spoilt = window.all_damaged > config.data.max_bad and step < t.steps
            last = progress.stop or progress.diverged or spoilt or step == t.steps
            save = last or progress.save or (t.save_every > 0 and step % t.save_every == 0)
            snapshot = t.snapshot_every > 0 and step % t.snapshot_every == 0
            if save or snapshot:
                watchdog.at(f"section 'save' of step {step}", math.inf)  # as long as ranks wait in collectives
                metadata = {"step": step, **progress.metadata(), "branch": manifest["branch"]}
                metadata["elapsed_seconds"] = round(clock.elapsed, 3)
                metadata |= {"run": origin.run, "data": origin.data, "config": to_dict(config)}
                metadata["versions"] = versions(("megapromoe", "torch", "deepspeed"))
                with window.paused():
                    manager.save(metadata, checkpoint=save, snapshot=snapshot)
                if save:
                    save_clock.restart()
                    progress.saved()
            if last:
                manager.finish(last=True)
            if spoilt:
                raise TrainingError(
                    f"step {step}: {window.all_damaged} samples had damaged records (data.max_bad ="
                    f" {config.data.max_bad}), named in the warnings of all ranks; step {step} is saved: see"
                    f" `megapromoe data check {config.data.path}`, mend the files and repeat the command"
                )
            if progress.diverged or (step == t.steps and progress.skipped_in_a_row):
                raise TrainingError(note_skipped(run, config, step, progress))
            if last:
                metrics.finish_bar()
                for line in closing_lines(config, run.folder, step, metrics.last, clock):
                    logger.info("%s", line)
            if progress.stop and step < t.steps:
                raise Interrupted(f"asked to stop: step {step} of {t.steps} is saved, repeat the command to go on")
        watchdog.at("the end of the run")
    finally:
        batches.close()
        metrics.close()
    engine.close()


def _open_dataset(config: Config) -> Dataset:
    """The data set; where one rank cannot open it, no rank goes on. Collective.

    Where no rank can, the path or the settings are wrong; where some cannot, their nodes may be.
    """
    wrong = ExitCode.MISCONFIGURED
    with raising_together(TrainingError, catch=(DatasetError,), name_ranks=True, exit_code=wrong):
        return open_dataset(config)


def _micro_step(engine: Engine, objective: Objective, batch: Batch, window: MetricAccumulator) -> Tensor:
    """Forward and backward of one micro-batch; returns its loss, detached."""
    x_BCHW, t_B = objective.corrupt(batch.clean_BCHW, batch.noise_BCHW, batch.u_B)

    def loss(prediction: Tensor, auxiliary: AuxiliaryOutput) -> tuple[Tensor, Tensor]:
        denoising = objective.loss(prediction, batch.clean_BCHW, batch.noise_BCHW, batch.u_B)
        total = denoising + auxiliary.total()
        window.add(denoising, total, auxiliary)
        return total, total.detach()

    return engine.micro_step(x_BCHW, t_B, batch.labels_B, batch.num_conditional, loss=loss)


def _draw(engine: Engine, ema: EMA, config: Config) -> np.ndarray:
    """A grid of samples of the averaged weights, drawn by all ranks together with the model as it is laid out."""
    classes = config.model.num_classes
    labels = [c for c in range(min(classes, 10)) for _ in range(4)]
    with ema.swapped_in():
        images = generate(engine.module, config, labels, list(range(len(labels))))
    shown = images[:, :3] if images.shape[1] == 4 else images  # latents: the first three channels, as colours
    return grid(shown.cpu(), columns=8, scale=picture_scale(config.model.input_size))
