"""The state of a study's jobs, only from the files in its folder, so that jobs may run on other machines."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from megapromoe.studies.attempts import attempts_of
from megapromoe.studies.attempts import in_words as attempts_in_words
from megapromoe.studies.causes import in_brackets
from megapromoe.studies.evaluations import Evaluation
from megapromoe.studies.job_processes import STOPPED, units, units_done
from megapromoe.studies.study import Job, Study, failure
from megapromoe.studies.task_locks import is_locked, owner
from megapromoe.work_progress import duration

QUIET = 900.0  # seconds; a job on another machine without visible lock counts as running if its last line is not older
STATES = ("running", "done", "waiting", "stopped", "failed", "stopped early")


@dataclass(frozen=True)
class JobState:
    """The state of a job.

    Attributes:
        state: one of `STATES`.
        done: number of finished units (training steps or evaluated checkpoints); for a running training, logged steps.
        age: seconds since its last output or log line; None if it never started.
        remark: the reason why it failed or waits, or the process that runs it.
    """

    job: Job
    state: str
    done: int
    age: float | None
    remark: str = ""


def job_state(study: Study, job: Job, now: float) -> JobState:
    """The state of one job; `now` in seconds since 1970."""
    done, age = units_done(study, job), _age(study, job, now)
    task = job.task if isinstance(job, Evaluation) else job
    if (step := study.stopped_early(task)) is not None and not is_locked(study, job):
        return JobState(job, "stopped early", done, age, f"by the comparison at step {step:,}")
    if study.done(job):
        return JobState(job, "done", units(job), age, attempts_in_words(attempts_of(study, job)))
    outcome = study.outcome(job)
    if outcome is not None and outcome["code"] == STOPPED:
        return JobState(job, "stopped", done, age, "`study run` continues it")
    if outcome is not None and outcome["code"] != 0:
        reason = (outcome["said"].splitlines() or [""])[0][:160]
        why = failure(outcome["code"]) if outcome["code"] < 0 else f"exit code {outcome['code']}"
        why += in_brackets(outcome)
        history = attempts_in_words(attempts_of(study, job))
        remark = (f"{why}: {reason}" if reason else why) + (f"; {history}" if history else "")
        return JobState(job, "failed", done, age, remark)
    if outcome is not None or not study.log(job).exists():
        return JobState(job, "waiting", done, age, _waits_for(study, job))
    # The command that starts a job removes the earlier outcome, and writes a new one when the job has ended.
    holder = owner(study, job)
    if is_locked(study, job):
        return _running(study, job, age, holder)
    elsewhere = " on " in holder and holder.rpartition(" on ")[2] != socket.gethostname()
    if elsewhere and age is not None and age < QUIET:
        return _running(study, job, age, f"{holder}, according to its last line")
    return JobState(job, "failed", done, age, f"killed together with the command that started it ({holder})")


def _running(study: Study, job: Job, age: float | None, holder: str) -> JobState:
    done = units_done(study, job) if isinstance(job, Evaluation) else study.steps_logged(job)
    return JobState(job, "running", done, age, holder)


def _waits_for(study: Study, job: Job) -> str:
    if isinstance(job, Evaluation) and not study.done(job.task):
        return "for its training"
    return ""


def _age(study: Study, job: Job, now: float) -> float | None:
    """Seconds since the log or the metrics of a job changed."""
    times = [study.last_line(job)[1]]
    with contextlib.suppress(OSError):
        times.append(study.log(job).stat().st_mtime)
    known = [time for time in times if time is not None]
    return max(0.0, now - max(known)) if known else None


def table(study: Study, states: Sequence[JobState]) -> str:
    """A table with a line for each job, and the number of jobs in each state."""
    lines = [("task", "job", "state", "done", "last line", "remark")]
    for state in states:
        job = state.job
        unit = "checkpoints" if isinstance(job, Evaluation) else "steps"
        task = job.task if isinstance(job, Evaluation) else job
        age = "-" if state.age is None else f"{duration(state.age)} ago"
        of = f"{state.done:,} of {units(job):,} {unit}"
        lines.append((str(task.index), job.name, state.state, of, age, state.remark))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    text = ["  ".join(f"{cell:{width}}" for cell, width in zip(line, [*widths, 0], strict=True)) for line in lines]
    counts = {name: sum(state.state == name for state in states) for name in STATES}
    summary = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    steps = [(state.done, units(state.job)) for state in states if not isinstance(state.job, Evaluation)]
    total = f"{sum(done for done, _ in steps):,} of {sum(of for _, of in steps):,} training steps"
    return "\n".join([*(line.rstrip() for line in text), f"{summary}; {total}"])
