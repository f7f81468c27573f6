"""Estimates when the jobs of a study will end, from the speed of finished and running jobs.

Speed is in operations per second of one job, separately for trainings and evaluations. The operations of all models are
known in advance, so one finished job is enough to estimate all others of its kind. Before that there is no estimate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from megapromoe.studies.job_processes import RunningJob, flops_of, is_training, units, units_done
from megapromoe.studies.study import Job, Study
from megapromoe.work_progress import duration


class Forecast:
    """Estimates the seconds until running jobs, and all jobs, end.

    Args:
        at_once: number of jobs that run at the same time.
        clock: the clock of `RunningJob.since`, in seconds.
    """

    def __init__(self, study: Study, at_once: int, clock: Callable[[], float] = time.monotonic):
        self._study, self._at_once, self._clock = study, at_once, clock
        self._ended: dict[bool, list[tuple[float, float]]] = {True: [], False: []}  # is training -> (flops, seconds)
        for job in study.jobs():
            self.add(job)

    def add(self, job: Job) -> None:
        """Adds the speed of the last start of a job, from its outcome file."""
        outcome = self._study.outcome(job) or {}
        if outcome.get("flops", 0) > 0 and outcome.get("seconds", 0) > 0:
            self._ended[is_training(job)].append((outcome["flops"], outcome["seconds"]))

    def job_left(self, running_job: RunningJob, running: Sequence[RunningJob] = ()) -> float | None:
        """Seconds until a running job ends; None if unknown."""
        done, seconds = self._progress(running_job), self._clock() - running_job.since
        left = flops_of(running_job.job, units(running_job.job) - running_job.done_before) - done
        if done and seconds > 0:
            return left * seconds / done  # from the speed of this job, including start-up
        speed = self._speed(is_training(running_job.job), running)
        return None if speed is None else max(0.0, left / speed - seconds)

    def all_left(self, running: Sequence[RunningJob], waiting: Sequence[Job]) -> float | None:
        """Seconds until all of these jobs end; None if unknown."""
        lefts = [self.job_left(running_job, running) for running_job in running]
        for job in waiting:
            speed = self._speed(is_training(job), running)
            flops = flops_of(job, units(job) - units_done(self._study, job))
            lefts.append(None if speed is None else flops / speed)
        known = [left for left in lefts if left is not None]
        if len(known) < len(lefts):
            return None
        return max([0.0, sum(known) / self._at_once, *known])

    def _speed(self, training: bool, running: Sequence[RunningJob]) -> float | None:
        """Operations per second of a job of this kind; None if unknown."""
        samples = list(self._ended[training])
        for running_job in running:
            if is_training(running_job.job) == training and (done := self._progress(running_job)):
                samples.append((done, self._clock() - running_job.since))
        seconds = sum(seconds for _, seconds in samples)
        return sum(flops for flops, _ in samples) / seconds if seconds > 0 else None

    def _progress(self, running_job: RunningJob) -> int:
        """Operations of a running job since its start; 0 if it has logged nothing yet."""
        if not is_training(running_job.job):
            return 0  # its results are written together at the end
        logged, when = self._study.last_line(running_job.job)
        if when is None or when < running_job.since_epoch:  # lines are from an earlier start
            return 0
        return flops_of(running_job.job, max(0, logged - running_job.done_before))


def in_words(seconds: float | None, now: datetime) -> str:
    """The end in `seconds` from `now`, as a duration and a time of day."""
    if seconds is None:
        return "at an unknown time"
    end = now + timedelta(seconds=seconds)
    form = "%H:%M" if end.date() == now.date() else "%d %b %H:%M"
    return f"in {duration(seconds)}, at {end.strftime(form)}"
