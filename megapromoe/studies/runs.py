"""Runs the jobs of a study, trainings and their evaluations, in separate processes, several at the same time.

The failure of a job is recorded, and the other jobs continue. A repeated command resumes unfinished jobs: a training
from its last checkpoint, an evaluation with the checkpoints without results. Several commands may run one study at the
same
time: each job has a lock, and a command waits for jobs that another command runs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import IO, Any

from megapromoe.studies.attempts import attempts_of, failures_in_a_row
from megapromoe.studies.causes import Cause
from megapromoe.studies.devices import Devices
from megapromoe.studies.early_stops import EarlyStops
from megapromoe.studies.evaluations import Evaluation
from megapromoe.studies.forecast import Forecast, in_words
from megapromoe.studies.grid import Task
from megapromoe.studies.job_processes import (
    STOPPED,
    RunningJob,
    ask_to_stop,
    end_in_words,
    finish,
    is_training,
    start,
    start_in_words,
    units_done,
)
from megapromoe.studies.placement import placement_of
from megapromoe.studies.recipe import StudyError
from megapromoe.studies.study import Job, Study
from megapromoe.studies.task_locks import is_locked, lock_task, owner
from megapromoe.work_progress import Progress

POLL = 0.5  # seconds between checks of the running jobs


@dataclass(frozen=True)
class Limits:
    """What bounds the jobs of one command.

    Attributes:
        evaluations: evaluations that run at the same time beside the other jobs; 0: they are counted with them.
        retries: starts of a job after failures in a row whose cause can pass, without progress in between. Failures
            under earlier commands count.
        gpus: GPUs that are divided among the jobs; empty: jobs use what they find.
        waits: evaluations wait for trainings of other commands, instead of being left out.
    """

    evaluations: int = 0
    retries: int = 0
    gpus: tuple[str, ...] = ()
    waits: bool = False


def run_tasks(
    study: Study,
    tasks: Iterable[Job],
    jobs: int = 1,
    asked_to_stop: Callable[[], bool] = lambda: False,
    limits: Limits | None = None,
) -> dict[str, int]:
    """Runs the unfinished jobs of `tasks`, `jobs` at the same time; returns the exit code of each, 0 if done.

    Args:
        tasks: trainings and evaluations. An evaluation starts when its training is done. If its training failed, or is
            neither done nor in `tasks`, the evaluation is left out and has no exit code.
        asked_to_stop: once it returns true, running jobs are requested to save and stop, and no other job is started.
            These jobs and those that were not started have code 75.

    A job that another command runs is left to that command. When it has ended, its exit code is used, except that this
    command runs a job that was stopped, or that was left when the other command was killed.

    A progress bar shows the steps of all trainings; without a terminal on stderr, a line is printed once a minute. A
    line for each start and end of a job has the estimated end of the job and of all jobs.
    """
    return _Runner(study, tuple(tasks), jobs, limits or Limits()).run(asked_to_stop)


class _Runner:
    def __init__(self, study: Study, jobs: tuple[Job, ...], at_once: int, limits: Limits):
        self.study, self.jobs, self.at_once, self.limits = study, jobs, at_once, limits
        self.devices = Devices(limits.gpus, at_once + limits.evaluations)
        self.locks: dict[str, IO[str]] = {}  # of jobs that failed and start again
        self.codes = {job.name: 0 for job in jobs if study.ended(job)}
        self.early = EarlyStops(study, is_alone=len(jobs) == 1)
        self.waiting = [job for job in jobs if job.name not in self.codes]
        self.running: list[RunningJob] = []
        # Jobs that other commands run, with their outcome when this command found them locked.
        self.left_to_others: dict[str, dict[str, Any] | None] = {}
        self.stopping = False
        self.forecast = Forecast(study, at_once + limits.evaluations)
        trainings = [job for job in jobs if not isinstance(job, Evaluation)]
        total = sum(job.config.train.steps for job in trainings)
        self.steps = {  # of each training, those of earlier starts included
            job.name: job.config.train.steps if job.name in self.codes else study.steps_logged(job) for job in trainings
        }
        done = sum(self.steps.values())
        self.progress = Progress(total, "step", f"study {study.folder}", done=done, left=self._left)

    def run(self, asked_to_stop: Callable[[], bool]) -> dict[str, int]:
        with self.progress:
            try:
                while self.waiting or self.running:
                    if asked_to_stop() and not self.stopping:
                        self.stopping = True
                        ask_to_stop(self.running)
                    self._apply_decisions()
                    self._start_ready()
                    if self.stopping and not self.running:
                        break
                    if not self.waiting and not self.running:
                        break
                    if not self.running and (blocked := self.early.why_blocked(self.waiting)):
                        self.progress.write(blocked)
                        break
                    time.sleep(POLL)
                    ended = [running_job for running_job in self.running if running_job.process.poll() is not None]
                    for running_job in ended:
                        self.running.remove(running_job)
                        self.devices.give_back(running_job.gpus)
                        was_asked = self.stopping or running_job.job.name in self.early.asked_to_stop
                        code, cause = finish(self.study, running_job, was_asked)
                        self.forecast.add(running_job.job)
                        if self.early.pauses(running_job.job, code) and not self.stopping:
                            running_job.lock.close()
                            self.waiting.append(running_job.job)
                        elif self.early.is_stopped(running_job.job):
                            running_job.lock.close()
                            self._ended(running_job.job, 0, "stopped early")
                        elif not self._start_again(running_job, code, cause):
                            running_job.lock.close()
                            self._ended(running_job.job, code, end_in_words(code, self.study, running_job))
                    self._show()
            except BaseException:  # includes Ctrl-C: no job may continue after this command ends
                ask_to_stop(self.running)
                for running_job in self.running:
                    with contextlib.suppress(KeyboardInterrupt):
                        running_job.process.wait()
                    finish(self.study, running_job, True)
                    running_job.lock.close()
                raise
            finally:
                for lock in self.locks.values():
                    lock.close()
        return self.codes | {job.name: STOPPED for job in self.waiting}

    def _start_ready(self) -> None:
        """Starts waiting jobs up to the limits, and drops evaluations that can no longer start."""
        for job in list(self.waiting):
            if self.stopping:
                return
            if self.early.is_blocked(job) or (isinstance(job, Evaluation) and not self._is_ready(job)):
                continue
            gpus = self._place_for(job)
            if gpus is None:
                continue
            lock = self.locks.pop(job.name, None) or lock_task(self.study, job)
            if lock is None:
                self.devices.give_back(gpus)
                if job.name not in self.left_to_others:
                    self.left_to_others[job.name] = self.study.outcome(job)
                    verb = "trained" if is_training(job) else "evaluated"
                    by = f"is {verb} by another command ({owner(self.study, job)}); left to it"
                    self.progress.write(f"{job.name}: {by}")
                continue
            self.waiting.remove(job)
            code = _code_of_others(self.study, job, self.left_to_others)
            if code is None:
                running_job = start(self.study, job, lock, gpus)
                self.running.append(running_job)
                number = len(self.codes) + len(self.running)
                line = f"{number} of {len(self.jobs)}: {start_in_words(self.study, running_job)}; it should end "
                line += in_words(self.forecast.job_left(running_job, self.running), datetime.now())
                if len(self.jobs) > 1:  # a job of an array has no information on the other jobs
                    line += f", the study {in_words(self._left(), datetime.now())}"
                self.progress.write(line)
                continue
            lock.close()
            self.devices.give_back(gpus)
            how = "done" if code == 0 else "failed"
            self._ended(job, code, f"{how} by another command")

    def _place_for(self, job: Job) -> tuple[str, ...] | None:
        """The GPUs of a job that may start now; None if it exceeds a limit."""
        separate = self.limits.evaluations > 0
        same = [r for r in self.running if not separate or is_training(r.job) == is_training(job)]
        at_once = self.limits.evaluations if separate and not is_training(job) else self.at_once
        return self.devices.take(placement_of(self.study.recipe, job)) if len(same) < at_once else None

    def _start_again(self, running_job: RunningJob, code: int, cause: Cause | None) -> bool:
        """Puts a failed job in front of the waiting ones, with its lock, if its cause can pass and a retry is left."""
        job = running_job.job
        if self.stopping or code == 0 or cause is None or not cause.passes:
            return False
        failures = failures_in_a_row(attempts_of(self.study, job), units_done(self.study, job))
        if failures > self.limits.retries:
            return False
        self.waiting.insert(0, job)
        self.locks[job.name] = running_job.lock
        words = end_in_words(code, self.study, running_job) if code != STOPPED else f"{cause.name} (exit code {code})"
        self.progress.write(f"{job.name}: {words}; starts again, retry {failures} of {self.limits.retries}")
        return True

    def _apply_decisions(self) -> None:
        """Makes the decisions on early stopping that are possible, and requests runs to pause or stop by them."""
        for line in self.early.update(self.running):
            self.progress.write(line)
        for job in [job for job in self.waiting if self.early.is_stopped(job)]:
            self.waiting.remove(job)
            self._ended(job, 0, "stopped early")

    def _is_ready(self, job: Evaluation) -> bool:
        """Whether the training of an evaluation is done. Drops the evaluation if that cannot happen."""
        if self.study.done(job.task):
            return True
        if self.limits.waits and not self._has_failed(job.task):
            return False
        will_be_trained = job.task in self.waiting or any(running_job.job == job.task for running_job in self.running)
        if not will_be_trained:
            self.waiting.remove(job)
            why = f"its training is not done ({self.study.state(job.task)})"
            self.progress.write(f"{job.name}: not started, {why}")
        return False

    def _has_failed(self, task: Task) -> bool:
        """Whether the last start of a training failed, so that nothing but another command continues it."""
        outcome = self.study.outcome(task)
        return outcome is not None and outcome["code"] not in (0, STOPPED) and not is_locked(self.study, task)

    def _ended(self, job: Job, code: int, words: str) -> None:
        self.codes[job.name] = code
        self._count(job)
        line = f"{job.name}: {words} ({len(self.codes)} of {len(self.jobs)})"
        if (self.waiting or self.running) and not self.stopping:
            line += f"; the study should end {in_words(self._left(), datetime.now())}"
        self.progress.write(line)

    def _left(self) -> float | None:
        return self.forecast.all_left(self.running, self.waiting)

    def _count(self, job: Job) -> None:
        if not isinstance(job, Evaluation):
            self.steps[job.name] = self.study.steps_logged(job)

    def _show(self) -> None:
        for running_job in self.running:
            self._count(running_job.job)
        self.progress.update(max(0, sum(self.steps.values()) - self.progress.done))
        self.progress.note(", ".join(running_job.job.name for running_job in self.running))


def jobs_to_run(
    study: Study, tasks: Sequence[Task], evaluate: bool, alone: bool, train: bool = False, waits: bool = False
) -> tuple[Job, ...]:
    """The jobs that `study run` shall run.

    Args:
        tasks: the tasks of the command.
        evaluate: only run their evaluations.
        train: only run their trainings.
        waits: an evaluation may be of a task that is not trained yet.
        alone: there is one task, for a job of an array, which either trains or evaluates; else trainings are followed
            by their evaluations.

    Raises StudyError for evaluations that are not possible.
    """
    if not evaluate:
        return tuple(tasks) if alone or train else study.jobs(tasks)
    jobs = tuple(job for job in study.jobs(tasks) if isinstance(job, Evaluation))
    if not jobs:
        rule = "the recipe has no section `evaluate`; plan a study in another folder, from a recipe with one"
        raise StudyError([f"--evaluate: {study.folder / 'study.yaml'}: {rule}"])
    if alone and not waits and not study.ended(tasks[0]):
        first = f"train it first: megapromoe study run {study.folder} --task {tasks[0].index}"
        raise StudyError([f"--evaluate: {tasks[0].name} is not trained ({study.state(tasks[0])}); {first}"])
    return jobs


def exit_code(codes: dict[str, int]) -> int:
    """The exit code for all jobs: that of a single job; else 0 if all are done, 75 if some were stopped, or 1."""
    if len(codes) == 1:
        code = next(iter(codes.values()))
        return code if code >= 0 else 128 - code  # killed by a signal: the exit code that a shell reports
    if STOPPED in codes.values():
        return STOPPED
    return int(any(codes.values()))


def _code_of_others(study: Study, job: Job, left_to_others: dict[str, dict[str, Any] | None]) -> int | None:
    """The exit code of a job that another command has run since this one started; None if this command must run it."""
    if study.ended(job):
        return 0
    if job.name not in left_to_others:
        return None
    outcome = study.outcome(job)
    if outcome is None or outcome == left_to_others[job.name] or outcome["code"] in (0, STOPPED):
        return None
    return outcome["code"]
