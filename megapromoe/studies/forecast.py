"""When the jobs of a study will have ended, from the speed of those that ended and of those that run.

Speed is in operations a second of one job, for trainings and for evaluations apart: what their models cost is known
beforehand, so that one finished job tells of all others of its kind. Before the first there is no forecast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from megapromoe.studies.job_processes import RunningJob, flops_of, is_training, units, units_done
from megapromoe.studies.study import Job, Study
from megapromoe.work_progress import duration


class Forecast:
    """Seconds until running jobs, and all jobs, have ended.

    Args:
        at_once: jobs that run at a time.
        clock: seconds of the clock that `RunningJob.since` has.
    """

    def __init__(self, study: Study, at_once: int, clock: Callable[[], float] = time.monotonic):
        self._study, self._at_once, self._clock = study, at_once, clock
        self._ended: dict[bool, list[tuple[float, float]]] = {True: [], False: []}  # is training -> (flops, seconds)
        for job in study.jobs():
            self.add(job)

    def add(self, job: Job) -> None:
        """Takes in the last start of a job, as its outcome has it."""
        outcome = self._study.outcome(job) or {}
        if outcome.get("flops", 0) > 0 and outcome.get("seconds", 0) > 0:
            self._ended[is_training(job)].append((outcome["flops"], outcome["seconds"]))

    def job_left(self, running_job: RunningJob, running: Sequence[RunningJob] = ()) -> float | None:
        """Seconds until a running job has ended; None: unknown."""
        done, seconds = self._progress(running_job), self._clock() - running_job.since
        left = flops_of(running_job.job, units(running_job.job) - running_job.done_before) - done
        if done and seconds > 0:
            return left * seconds / done  # its own speed, start-up included
        speed = self._speed(is_training(running_job.job), running)
        return None if speed is None else max(0.0, left / speed - seconds)

    def all_left(self, running: Sequence[RunningJob], waiting: Sequence[Job]) -> float | None:
        """Seconds until all of these jobs have ended; None: unknown."""
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
        """Operations a second of a job of this kind."""
        samples = list(self._ended[training])
        for running_job in running:
            if is_training(running_job.job) == training and (done := self._progress(running_job)):
                samples.append((done, self._clock() - running_job.since))
        seconds = sum(seconds for _, seconds in samples)
        return sum(flops for flops, _ in samples) / seconds if seconds > 0 else None

    def _progress(self, running_job: RunningJob) -> int:
        """Operations that a running job has done since its start; 0 where it has logged nothing yet."""
        if not is_training(running_job.job):
            return 0  # its figures appear together, at its end
        logged, when = self._study.last_line(running_job.job)
        if when is None or when < running_job.since_epoch:  # lines of the start before
            return 0
        return flops_of(running_job.job, max(0, logged - running_job.done_before))


def in_words(seconds: float | None, now: datetime) -> str:
    """A moment that lies so many seconds ahead."""
    if seconds is None:
        return "unknown"
    end = now + timedelta(seconds=seconds)
    form = "%H:%M" if end.date() == now.date() else "%d %b %H:%M"
    return f"in {duration(seconds)}, at {end.strftime(form)}"
