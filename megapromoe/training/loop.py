"""The training run, from top to bottom.

Repeating the command resumes the run: the newest checkpoint is loaded, and the sample stream continues at the same
position, because that is determined by the number of completed steps.
"""

from __future__ import annotations

import contextlib
import logging
import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megapromoe.checkpoint.history import Start
from megapromoe.checkpoint.manager import CheckpointManager
from megapromoe.checkpoint.manifest import CheckpointError
from megapromoe.checkpoint.origin import Origin
from megapromoe.checkpoint.run_directory import RunDirectory, RunDirectoryError
from megapromoe.checkpoint.step_folders import MAIN
from megapromoe.config.options import Config, to_dict
from megapromoe.config.schedule import describe_changes, learning_rate
from megapromoe.conversion.start_report import Report, lines
from megapromoe.data.caption_batches import Captions, CaptionSource
from megapromoe.data.datasets import Dataset, DatasetError
from megapromoe.data.sample_stream import Batch, SampleStream, prefetch
from megapromoe.data.sources import open_captions, open_dataset, open_teacher_features
from megapromoe.data.teacher import TeacherFeatures
from megapromoe.diffusion.multistep import MethodUnavailable
from megapromoe.diffusion.objectives import Objective, make_objective
from megapromoe.distributed import runtime, watchdog
from megapromoe.distributed.agreement import (
    broadcast_from_rank0,
    raise_if_any_rank_failed,
    raising_together,
    this_rank,
    watched_job,
)
from megapromoe.distributed.mesh import make_mesh
from megapromoe.distributed.stop_requests import StopRequest, install_signal_handlers
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.errors import ExitCode, UserError, repeating_cannot_help
from megapromoe.nn.dit import AuxiliaryOutput
from megapromoe.nn.text_condition import TextCondition
from megapromoe.training.expert_placement import ChosenPlacement, choose_placement, write_placement
from megapromoe.training.initializing import start_from_weights
from megapromoe.training.metric_accumulator import MetricAccumulator
from megapromoe.training.metrics import Metrics
from megapromoe.training.preview import Preview, open_preview
from megapromoe.training.resuming import plan_start, report_skipped_steps, restore_run
from megapromoe.training.routing_recorder import RoutingRecorder
from megapromoe.training.run_clock import RunClock, elapsed_before
from megapromoe.training.step_profiler import StepProfiler
from megapromoe.training.step_tracker import SaveClock, StepTracker, max_accepted_norm
from megapromoe.training.summary import closing_lines, experts, sample_command, starting, summary
from megapromoe.training.wandb_run import START_SECONDS, WandbUnavailable, check_installed
from megapromoe.versions import versions

logger = logging.getLogger(__name__)


class TrainingError(UserError):
    """A run that cannot continue."""

    on_all_ranks = True


class Interrupted(TrainingError):
    """A run that was stopped by a signal, after saving a checkpoint."""

    exit_code = ExitCode.STOPPED


def train(
    config: Config,
    folder: Path,
    launch: runtime.LaunchEnvironment,
    from_step: int | None = None,
    allow: tuple[str, ...] = (),
    fork: str | None = None,
) -> None:
    """Trains to `train.steps` in a run directory, from its newest checkpoint if there is one. Collective.

    A stop request to any rank (see `stop_requests`) ends the run after the current step, with a checkpoint.

    Args:
        config: configuration of the run.
        folder: the run directory.
        launch: this rank, from the launcher's environment.
        from_step: go back to the checkpoint of this step instead; see `history.plan_start`.
        allow: settings of `origin.FIXED`, such as "data.seed", that may differ from those of the run; also "data" and
            "run".
        fork: name of the branch that begins at `from_step`.

    Raises Interrupted after a stop request; RunDirectoryError, CheckpointError or TrainingError. Each is raised on
    every rank and names the remedy.
    """
    records = folder / "flight_records"
    limits = config.train.timeout, config.train.step_timeout
    with install_signal_handlers(launch) as asked_to_stop, watched_job(launch, *limits, records) as job:
        watchdog.starting("opening the run directory")
        claimed = _claim_folder(config, folder, launch, allow)
        run = claimed or RunDirectory(folder)
        try:
            if claimed and job.device.type == "cuda":
                _make_folder(records)
            with repeating_cannot_help(CheckpointError):
                start, origin = plan_start(config, run, from_step, fork)
            memory = runtime.device_memory(job.device)
            placement = choose_placement(config, run, start.step, launch.local_world, memory)
            _train(config, run, job, start, origin, placement, allow, asked_to_stop)
        finally:
            if claimed:
                with contextlib.suppress(OSError):
                    records.rmdir()  # only removes it if it is empty, that is, without a hang
                claimed.close()


def _make_folder(records: Path) -> None:
    """Creates the folder for NCCL's flight records. A failure is logged: the run does not need them."""
    try:
        records.mkdir(exist_ok=True)
    except OSError as error:
        logger.warning(
            "%s: cannot be created (%s); NCCL will write no flight records in case of a hang", records, error.strerror
        )


def _claim_folder(
    config: Config, folder: Path, launch: runtime.LaunchEnvironment, allow: tuple[str, ...]
) -> RunDirectory | None:
    """Claims the folder on rank 0 and returns it there, None on other ranks. A failure is raised on every rank."""
    run = None
    with raising_together(RunDirectoryError):
        if launch.rank == 0:
            run = RunDirectory.claim(folder, config, launch.world, allow, launcher=launch.launcher)
    return run


def _record_start(run: RunDirectory, initial_weights: Report | None) -> None:
    """Writes config.yaml and the entry of environment.json on rank 0, if no rank has failed. Collective."""
    raise_if_any_rank_failed(None, RunDirectoryError)  # waits for all ranks: one that failed raises here on all
    with raising_together(RunDirectoryError):
        if this_rank() == 0:
            run.record({} if initial_weights is None else {"initial_weights": initial_weights})


def _train(
    config: Config,
    run: RunDirectory,
    job: runtime.Job,
    start: Start,
    origin: Origin,
    placement: ChosenPlacement,
    allow: tuple[str, ...],
    asked_to_stop: StopRequest,
) -> None:
    t, p, device = config.train, config.parallel, job.device
    watchdog.starting("making the groups")
    mesh = make_mesh(p.tp, p.ep, p.expert_tp, t.timeout, p.shard_ranks)
    watchdog.starting("opening the data")
    dataset, captions, teacher, preview = _open_data(config)
    example = captions.text.caption(0) if isinstance(captions, Captions) else None
    stream = SampleStream(
        dataset,
        config.data.seed,
        config.data.condition_dropout,
        config.data.flip,
        config.model.null_class,
        captions,
        dropout_stratum=config.data.condition_dropout_stratum,
        teacher=teacher,
    )
    watchdog.starting("building the model and its engine")
    if config.model.has_custom_router:
        _check_router_version(config)
    if t.wandb:
        _check_wandb(config)
    engine = Engine.new(config, mesh, device, placement.placements)
    ema = EMA(engine, t.ema_decays, t.ema_warmup)
    objective = make_objective(config)

    checkpoints = CheckpointManager(
        run.checkpoints, engine, ema, commit_timeout=t.timeout / 2
    )  # the other ranks wait in a collective, with t.timeout
    watchdog.starting("reading the checkpoint", math.inf)  # verifying the hashes reads all bytes
    with repeating_cannot_help(CheckpointError):
        manifest = restore_run(run, engine, ema, start, partial(origin.check, allow=allow))
    initial_weights = None
    if manifest is None:
        initial_weights = start_from_weights(config, engine, ema)
        manifest = {"step": 0, "branch": start.branch or MAIN}
    elif t.init_from:
        logger.info("train.init_from = %s: not used, because the run resumes from its own checkpoint", t.init_from)
    watchdog.starting("recording the start")
    _record_start(run, initial_weights)
    step = manifest["step"]
    if mesh.rank == 0:
        begins = f"resumes from step {step:,}" if step else "begins at step 0"
        for line in summary(config, mesh.world_size, run.folder, begins, dataset, runtime.describe_device(device)):
            logger.info("%s", line)
        for line in experts(placement.lines) + starting(lines(initial_weights or {})):
            logger.info("%s", line)
        write_placement(run.folder, placement)
    for line in describe_changes(config, run.changed, step):  # only rank 0 has them, and only rank 0 logs
        logger.info("changed since the last start: %s", line)
    if step >= t.steps:
        logger.info("%s: all %d steps are done; to continue, set train.steps to a larger number", run.folder, step)
        if command := sample_command(config, run.folder, example):
            logger.info("next: %s", command)
        return

    index_ranges = (
        index_range
        for s in range(step, t.steps)
        for index_range in stream.micro_batches(s, mesh.dp.size, mesh.dp.rank, t.accumulation, t.global_batch)
    )
    batches = prefetch(stream, index_ranges, config.data.workers, pin=device.type == "cuda")
    # Only rank 0 logs, and its metadata are saved.
    before = elapsed_before(manifest, run.metrics, t.global_batch) if mesh.rank == 0 else 0.0
    clock = RunClock(before, step, t.steps)
    if t.wandb:
        watchdog.starting("connecting to Weights & Biases", START_SECONDS)
    metrics = Metrics(run.folder, config, t.steps, step, enabled=mesh.rank == 0, clock=clock)
    accumulator = MetricAccumulator(config, mesh, device, placement.placements)
    recorder = RoutingRecorder(config, mesh, run.routing_trace, step, placement.owner_ME)
    tracker = StepTracker(t, manifest)
    profiler = StepProfiler(t.profiled_steps, run.folder, mesh.rank, device, step)
    save_clock = SaveClock(t.save_minutes, mesh.rank)
    compiling = watchdog.COMPILING if t.compile else 0.0  # only for the first step of this start
    compiling_update = watchdog.COMPILING if t.adamw_backend == "fused" else 0.0
    asked_to_stop.steps_begin()
    try:
        while step < t.steps:
            profiler.begin(step + 1)
            loss = torch.zeros((), device=device)
            for micro in range(t.accumulation):
                watchdog.at(f"section 'data' of step {step + 1}")
                batch = next(batches).to(device)
                accumulator.damaged += batch.damaged
                watchdog.at(f"section 'forward and backward' of step {step + 1}", compiling)
                loss += _micro_step(engine, objective, batch, accumulator, recorder)
                if micro < t.accumulation - 1:
                    engine.finish_micro_step()
            rate = learning_rate(t, step)
            compiling = 0.0
            watchdog.at(f"section 'update' of step {step + 1}", compiling_update)
            compiling_update = 0.0
            max_norm = max_accepted_norm(t.spike_factor, tracker.recent)
            result = engine.step(rate, loss, asked_to_stop(), max_norm, save_clock.due())
            accumulator.end_step(result.applied_on_device)
            recorder.end_step(result.applied_on_device)
            ema.update(result)
            step += 1
            tracker.add(step, result)
            if step % t.log_every == 0 or step == t.steps:
                watchdog.at(f"section 'log' of step {step}")
                values, layers = accumulator.close(result.norm, rate)
                metrics.log(step, values | checkpoints.save_metrics, layers)
                checkpoints.save_metrics = {}
                recorder.write()
            if preview is not None and step % t.sample_every == 0:
                watchdog.at(f"section 'sample' of step {step}")
                with accumulator.paused():
                    picture = preview.picture(engine, ema, config)
                    metrics.samples(step, picture)
                if mesh.rank == 0 and tracker.average.has_initial_weights:
                    drawn = tracker.average.in_words()
                    logger.warning("picture of step %d: drawn with the averaged weights, %s", step, drawn)
            too_many_damaged = accumulator.all_damaged > config.data.max_damaged and step < t.steps
            last = tracker.stop or tracker.diverged or too_many_damaged or step == t.steps
            if profiler.ends(step, last):
                watchdog.at(f"section 'profile' of step {step}", math.inf)  # a trace takes seconds a step
                with accumulator.paused():
                    profiler.write()
            save = last or tracker.save or (t.save_every > 0 and step % t.save_every == 0)
            snapshot = t.snapshot_every > 0 and step % t.snapshot_every == 0
            if save or snapshot:
                watchdog.at(f"section 'save' of step {step}", math.inf)  # collectives have a timeout of their own
                metadata = {"step": step, **tracker.metadata(), "branch": manifest["branch"]}
                metadata["elapsed_seconds"] = round(clock.elapsed, 3)
                metadata |= {"run": origin.run, "data": origin.data, "config": to_dict(config)}
                metadata["versions"] = versions(("megapromoe", "torch", "deepspeed"))
                with accumulator.paused():
                    recorder.write()  # a start that resumes from this checkpoint does not repeat these steps
                    checkpoints.save(metadata, checkpoint=save, snapshot=snapshot)
                if save:
                    save_clock.restart()
                    tracker.saved()
            if last:
                checkpoints.finish(last=True)
            if too_many_damaged:
                raise TrainingError(
                    f"step {step}: {accumulator.all_damaged} samples had damaged records (data.max_damaged ="
                    f" {config.data.max_damaged}), named in the warnings of all ranks; step {step} is saved: see"
                    f" `megapromoe data check {config.data.path}`, repair the files and repeat the command"
                )
            if tracker.diverged or (step == t.steps and tracker.skipped_in_a_row):
                raise TrainingError(report_skipped_steps(run, config, step, tracker))
            if last:
                metrics.finish_bar()
                for line in closing_lines(config, run.folder, step, metrics.last, clock, example):
                    logger.info("%s", line)
            if tracker.stop and step < t.steps:
                asked_to_stop()  # logs the end of the launcher also where another rank noticed it first
                raise Interrupted(f"asked to stop: step {step} of {t.steps} is saved, repeat the command to continue")
        watchdog.at("the end of the run")
    finally:
        profiler.close()
        batches.close()
        recorder.close()
        metrics.close()
    engine.close()


def _open_data(
    config: Config,
) -> tuple[Dataset, CaptionSource | None, TeacherFeatures | None, Preview | None]:
    """Opens the data set, its captions if the model takes texts, a teacher's features, and what pictures show.

    Collective: a failure is raised on every rank.

    If no rank can open it, the path or the settings are wrong, and repeating cannot help. If only some ranks cannot,
    their nodes may be at fault.
    """
    wrong = ExitCode.MISCONFIGURED
    with raising_together(TrainingError, catch=(DatasetError, MethodUnavailable), name_ranks=True, exit_code=wrong):
        dataset = open_dataset(config)
        captions = open_captions(config, dataset)
        return dataset, captions, open_teacher_features(config, dataset), open_preview(config, captions)


def _check_router_version(config: Config) -> None:
    """Raises TrainingError if the ranks have different files of a user's router. Collective."""
    router = config.model.router
    expected, problem = broadcast_from_rank0(router), None
    if router != expected:
        problem = f"model.router = {router!r}: rank 0 has {expected!r}; copy one file to all nodes"
    raise_if_any_rank_failed(problem, TrainingError, name_ranks=True, exit_code=ExitCode.MISCONFIGURED)


def _check_wandb(config: Config) -> None:
    """Raises TrainingError if rank 0 is to write to Weights & Biases and cannot import it. Collective."""
    problem = None
    if this_rank() == 0:
        try:
            check_installed(config.train.wandb)
        except WandbUnavailable as error:
            problem = str(error)
    raise_if_any_rank_failed(problem, TrainingError, exit_code=ExitCode.MISCONFIGURED)


def _micro_step(
    engine: Engine, objective: Objective, batch: Batch, accumulator: MetricAccumulator, recorder: RoutingRecorder
) -> Tensor:
    """Forward and backward pass of one micro-batch. Returns its total loss, () and detached."""
    x_BCHW, t_B = objective.corrupt(batch.clean_BCHW, batch.noise_BCHW, batch.u_B)

    def loss(prediction: Tensor, auxiliary: AuxiliaryOutput) -> tuple[Tensor, Tensor]:
        denoising = objective.loss(prediction, batch.clean_BCHW, batch.noise_BCHW, batch.u_B)
        auxiliary = auxiliary.aligned(batch.teacher_BWHW, engine.config.model.align_weight)
        total = denoising + auxiliary.total()
        accumulator.add(denoising, total, auxiliary)
        recorder.add(auxiliary)
        return total, total.detach()

    condition: Tensor | TextCondition = batch.labels_B
    if batch.captions is not None:
        condition = TextCondition(batch.captions.features_BND, batch.captions.mask_BN)
    return engine.micro_step(x_BCHW, t_B, condition, batch.num_conditional, loss=loss)
