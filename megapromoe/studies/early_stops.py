"""Applies the decisions on early stopping to the jobs of one `study run`: pauses runs at a step, and stops them.

A command that runs all tasks pauses each run at the next step at which models are compared, so that no run trains
further than needed for a decision. When all runs have logged this step, the decision is made, and the others go on. A
job of an array runs one task and is not paused; it stops when its model is stopped.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from megapromoe.studies.early_decisions import decide, decision_in_words, next_step, waits_for
from megapromoe.studies.evaluations import Evaluation
from megapromoe.studies.grid import Task
from megapromoe.studies.job_processes import STOPPED, RunningJob, ask_to_stop
from megapromoe.studies.study import Job, Study
from megapromoe.studies.task_locks import is_locked

EVERY = 2.0  # seconds between two readings of decisions and of the logs of other runs


class EarlyStops:
    """The early stops of one command.

    Args:
        is_alone: whether the command runs one job, which is not paused.

    Attributes:
        asked_to_stop: names of the running jobs that were requested to pause or stop.
    """

    def __init__(self, study: Study, is_alone: bool):
        self._study, self._is_alone = study, is_alone
        self._is_used = study.recipe.stop_early is not None
        self._read = -EVERY
        self._refresh()
        self.asked_to_stop: set[str] = set()

    def update(self, running: Sequence[RunningJob]) -> list[str]:
        """Decides if possible, and requests running jobs to pause or stop; returns a line for each new decision."""
        if not self._is_used:
            return []
        lines = []
        if time.monotonic() - self._read >= EVERY:
            self._read = time.monotonic()
            if not running or any(self._reached(running_job.job) for running_job in running):
                lines = [decision_in_words(decision) for decision in decide(self._study)]
            self._refresh()  # also for decisions of other commands
        for running_job in running:
            job = running_job.job
            if job.name not in self.asked_to_stop and (self.is_blocked(job) or self.is_stopped(job)):
                self.asked_to_stop.add(job.name)
                ask_to_stop([running_job])
        return lines

    def pauses(self, job: Job, code: int) -> bool:
        """Whether a job whose process has ended goes on later, because it was paused and not stopped."""
        was_asked = job.name in self.asked_to_stop
        self.asked_to_stop.discard(job.name)
        return was_asked and code == STOPPED and not self.is_stopped(job)

    def is_stopped(self, job: Job) -> bool:
        """Whether the model of a job was stopped early."""
        task = job.task if isinstance(job, Evaluation) else job
        return task.name in self._stopped and not self._study.done(job)

    def is_blocked(self, job: Job) -> bool:
        """Whether a training has reached the next comparison, and waits for its decision."""
        return not self._is_alone and self._reached(job)

    def why_blocked(self, waiting: Iterable[Job]) -> str:
        """Why no waiting job can start, although none runs; "" if one can, or if another command trains one."""
        trainings = [job for job in waiting if isinstance(job, Task)]
        if not trainings or self._step is None or not all(self.is_blocked(job) for job in trainings):
            return ""
        behind = waits_for(self._study, self._step)
        if not behind or any(is_locked(self._study, task) for task in behind):
            return ""
        names = ", ".join(task.name for task in behind[:3]) + (" and others" if len(behind) > 3 else "")
        return (
            f"early stopping at step {self._step:,} waits for {names}, which this command cannot train: see `megapromoe"
            f" study status {self._study.folder}`; repeat the command when they can be trained"
        )

    def _refresh(self) -> None:
        """Reads the decisions that exist."""
        self._step = next_step(self._study)
        tasks = self._study.tasks if self._is_used else ()
        self._stopped = {task.name for task in tasks if self._study.stopped_early(task) is not None}

    def _reached(self, job: Job) -> bool:
        """Whether a training has logged the step of the next comparison and is not done."""
        if self._step is None or not isinstance(job, Task) or self._study.done(job):
            return False
        return self._study.steps_logged(job) >= self._step
