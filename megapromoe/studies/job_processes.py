"""Processes of a study's jobs (trainings and evaluations): starts them, stops them, and records how they ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.distributed import runtime
from megapromoe.io import naming_errors, open_regular, write_text
from megapromoe.studies.attempts import record_end, record_start
from megapromoe.studies.causes import Cause, cause_of, in_brackets
from megapromoe.studies.evaluations import RECORDS, Evaluation
from megapromoe.studies.grid import Task
from megapromoe.studies.placement import placement_of
from megapromoe.studies.study import Job, Study, failure

STOPPED = 75  # exit code of `megapromoe train`: stopped by a signal, and saved
TAIL_BYTES = 65536  # end of a log in which the error of a job is searched


def command(study: Study, job: Job) -> list[str]:
    """The command line of a job: the launcher, or this Python, with `-m megapromoe train` or `evaluate`."""
    start = list(placement_of(study.recipe, job).launcher) or [sys.executable]
    if isinstance(job, Evaluation):
        return [*start, "-m", "megapromoe", *job.words(study.run(job.task))]
    words = ["--config", str(study.config(job)), "--run-dir", str(study.run(job))]
    return [*start, "-m", "megapromoe", "train", *words]


@dataclass
class RunningJob:
    """A job that this process has started.

    Attributes:
        lock: the lock of the job, held until it ends.
        from_byte: byte offset at which its output starts in `log`.
        since: seconds of the monotonic clock at its start.
        since_epoch: the same time in seconds since 1970, to compare with file times.
        done_before: steps saved by earlier starts; for an evaluation, the number of evaluated checkpoints.
        gpus: the GPUs that only this job uses; empty if it was not limited to some.
    """

    job: Job
    launcher: str
    process: subprocess.Popen
    lock: IO[str]
    log: IO
    from_byte: int
    since: float
    since_epoch: float
    done_before: int
    gpus: tuple[str, ...] = ()


def start(study: Study, job: Job, lock: IO[str], gpus: tuple[str, ...] = ()) -> RunningJob:
    """Starts a job whose lock is held. A launcher that does not exist gives a process that exits with code 127.

    Args:
        gpus: the GPUs that the job may use; empty: all that this process sees.
    """
    path = study.log(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    words = command(study, job)
    study.outcome_file(job).unlink(missing_ok=True)  # left by an earlier start
    record_start(study, job)
    file = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    log = open(file, "ab", buffering=0)  # noqa: SIM115, open until the process ends
    begin, done_before = log.tell(), units_done(study, job)
    with naming_errors(path):
        log.write(f"$ {' '.join(words)}\n".encode())
    # A new session, so that Ctrl-C reaches only this process, which then requests the job to save.
    try:
        process = subprocess.Popen(
            words,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=runtime.environment_on(gpus) if gpus else None,
            pass_fds=(lock.fileno(),),  # the job stays locked while it runs, even if this process is killed
        )
    except OSError as error:
        log.write(f"{words[0]}: {error.strerror}\n".encode())
        process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(127)"], start_new_session=True)
    launcher = Path(words[0]).name
    return RunningJob(job, launcher, process, lock, log, begin, time.monotonic(), time.time(), done_before, gpus)


def ask_to_stop(running: Iterable[RunningJob]) -> None:
    """Requests the jobs to save and exit: sends SIGTERM to all their processes.

    srun gets SIGUSR1 instead, which it forwards to the ranks on all nodes; on SIGTERM it would kill them.
    """
    for running_job in running:
        with contextlib.suppress(ProcessLookupError):
            if running_job.launcher == "srun":
                running_job.process.send_signal(signal.SIGUSR1)
            else:
                os.killpg(running_job.process.pid, signal.SIGTERM)


def finish(study: Study, running_job: RunningJob, stopped: bool) -> tuple[int, Cause | None]:
    """Records how a job whose process has ended did so; returns its exit code and the cause. Its lock stays held.

    Args:
        stopped: whether the job was requested to stop.

    Returns:
        the exit code, 0 if the job is done, and the cause of a failure: None if it is done or was requested to stop.
    """
    running_job.log.close()
    job = running_job.job
    code, reason, done = running_job.process.returncode, "", units_done(study, job)
    cause = None
    if study.done(job):
        code = 0
    elif stopped:  # launchers return other exit codes after a requested stop
        code = STOPPED
    else:
        output = _output(study, running_job)
        diverged = isinstance(job, Task) and RunDirectory(study.run(job)).diverged.exists()
        cause = cause_of(code, _last_words(output), output, diverged)
        if code == 0:
            code, reason = 1, f"exit code 0, but {_lack(study, job)}"
        else:
            reason = _last_words(output)
    record_end(study, job, code, cause, done)
    outcome = {
        "code": code,
        "said": reason or (_last_words(_output(study, running_job)) if code else ""),
        "cause": cause.name if cause else "",
        "seconds": round(time.monotonic() - running_job.since, 1),
        "flops": flops_of(job, done - running_job.done_before),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(study.outcome_file(job), json.dumps(outcome) + "\n", parents=True)
    return code, cause


def _lack(study: Study, job: Job) -> str:
    """What is missing of a job that is not done."""
    if isinstance(job, Evaluation):
        steps = ", ".join(map(str, job.missing_steps(study.run(job.task))))
        return f"{study.run(job.task) / RECORDS} lacks results of step {steps} that match the recipe"
    return f"step {job.config.train.steps} is not saved in {study.run(job)}"


def units(job: Job) -> int:
    """Number of units of a job: training steps, or checkpoints to evaluate."""
    return len(job.steps) if isinstance(job, Evaluation) else job.config.train.steps


def units_done(study: Study, job: Job) -> int:
    """Number of units whose results are saved."""
    if isinstance(job, Evaluation):
        return len(job.steps) - len(job.missing_steps(study.run(job.task)))
    return min(study.steps_saved(job), job.config.train.steps)


def flops_of(job: Job, count: int) -> int:
    """Floating-point operations of `count` units of a job."""
    return job.flops(count) if isinstance(job, Evaluation) else job.flops // job.config.train.steps * count


def end_in_words(code: int, study: Study, running_job: RunningJob) -> str:
    """How a job ended, for a line of `study run`."""
    seconds = f"{time.monotonic() - running_job.since:.0f} s"
    if code == 0:
        return f"done in {seconds}"
    if code == STOPPED:
        return f"stopped after {seconds}, saved; repeat the command to continue"
    outcome = study.outcome(running_job.job)
    assert outcome is not None, "written when the job ended"
    ended = (f"failed with exit code {code}" if code > 0 else failure(code)) + in_brackets(outcome)
    return f"{ended} after {seconds}; {study.log(running_job.job)} ends with: {outcome['said']}"


def start_in_words(study: Study, running_job: RunningJob) -> str:
    """A line for the start of a job: variant, seed, steps, folder."""
    job = running_job.job
    if isinstance(job, Evaluation):
        rest = f", {running_job.done_before} of them done" if running_job.done_before else ""
        return f"evaluation of {job.task.name} starts ({job.in_words()}{rest}; {study.run(job.task)})"
    steps = job.config.train.steps
    how_far = f"steps {running_job.done_before + 1:,} to {steps:,}" if running_job.done_before else f"{steps:,} steps"
    return f"training {job.name} starts (variant {job.variant}, seed {job.seed}, {how_far}, {study.run(job)})"


def _output(study: Study, running_job: RunningJob) -> str:
    """The end of the output of this start."""
    with open(study.log(running_job.job), "rb") as file:
        file.seek(max(running_job.from_byte, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        return file.read().decode(errors="replace")


def _last_words(output: str) -> str:
    """The error in an output: from the last line that starts with `megapromoe:`, else the last line."""
    lines = [line for line in output.splitlines() if line.strip()]
    ours = [i for i, line in enumerate(lines) if re.match(r"megapromoe[:,] ", line)]
    return "\n".join(lines[ours[-1] :] if ours else lines[-1:])[:2000]


def is_training(job: Job) -> bool:
    """Whether a job is a training, not an evaluation."""
    return isinstance(job, Task)
