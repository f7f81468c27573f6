"""Tracks the results of the steps on the host: which were applied, and whether the run must stop or save."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megapromoe.checkpoint.average import Average, average_metadata, averages_at_start, averages_of
from megapromoe.config.train_options import TrainConfig
from megapromoe.engine.step_result import StepResult

logger = logging.getLogger(__name__)

RECENT, ENOUGH = 100, 20  # largest and smallest number of recent norms for `train.spike_factor`


def max_accepted_norm(spike_factor: float, recent: Sequence[float]) -> float:
    """The gradient norm above which a step is skipped.

    Args:
        spike_factor: multiple of the median of the recent norms; 0: no limit.
        recent: gradient norms of applied steps; there is no limit while they are fewer than `ENOUGH`.
    """
    return spike_factor * statistics.median(recent) if spike_factor and len(recent) >= ENOUGH else math.inf


class SaveClock:
    """Whether a checkpoint is due by `train.save_minutes`, by the clock of rank 0; never due on other ranks.

    The request is reduced over ranks together with the gradient norm. So all ranks get it after the same step, without
    extra communication.
    """

    def __init__(self, minutes: float, rank: int, now: Callable[[], float] = time.monotonic):
        """Args: `minutes`: interval, 0: never due; `now`: monotonic clock, seconds."""
        self._seconds, self._now = 60 * minutes if rank == 0 else 0.0, now
        self._since = now()

    def due(self) -> bool:
        """Whether the interval since the start of the last save is over."""
        return self._seconds > 0 and self._now() - self._since >= self._seconds

    def restart(self) -> None:
        """Restarts the interval: a save starts now."""
        self._since = self._now()


class StepTracker:
    """Tracks the results of steps. Each result is read one step later, so that the host does not wait for the GPU.

    Attributes:
        updates: number of applied steps; a step whose gradient is not finite is not applied.
        recent: gradient norms of the last applied steps.
        averages: state of the averaged weights after these updates, for each of `train.ema_decay`.
        stop: a rank received a stop request.
        save: a checkpoint is due by `train.save_minutes`.
        skipped_in_a_row: number of latest steps that were not applied.
        diverged: `train.max_bad_steps` steps in a row were not applied.
    """

    def __init__(self, t: TrainConfig, manifest: Mapping[str, Any]):
        """Args: `t`: the train options; `manifest`: manifest of the loaded checkpoint, empty for a new run."""
        self.t = t
        self.updates: int = manifest.get("updates", 0)
        saved = averages_of(manifest) if "updates" in manifest else ()
        self.averages = [start.average for start in averages_at_start(saved, t)]
        self.recent = deque(manifest.get("recent_norms", []), maxlen=RECENT)
        skipped = manifest.get("skipped_in_a_row", 0)
        # A run that ended as diverged continues when it is started again, maybe with other settings or past bad data.
        self.skipped_in_a_row: int = skipped if skipped < t.max_bad_steps else 0
        self.stop = self.diverged = self.save = False
        self._pending: deque[tuple[int, StepResult]] = deque()  # steps whose results were not read yet

    @property
    def average(self) -> Average:
        """State of the averages of the first decay, which previews are generated with."""
        return self.averages[0]

    def add(self, step: int, result: StepResult) -> None:
        """Adds a step and reads the results of the steps before it; also its own result if that is needed now."""
        self._pending.append((step, result))
        regular = (self.t.log_every, self.t.sample_every, self.t.save_every, self.t.snapshot_every)
        wanted = step == self.t.steps or self.t.spike_factor or any(every and step % every == 0 for every in regular)
        self._process(keep=0 if wanted else 1)
        if self.stop or self.diverged or self.save:
            self._process(keep=0)

    def saved(self) -> None:
        """A save of the last added step has started: clears all requests for a save."""
        self.save = False

    def metadata(self) -> dict[str, Any]:
        """Manifest entries for a checkpoint of the last added step, whose result must have been read."""
        return {
            "updates": self.updates,
            "recent_norms": list(self.recent),
            "skipped_in_a_row": self.skipped_in_a_row,
            **average_metadata(self.averages, self.updates),
        }

    def _process(self, keep: int) -> None:
        """Reads the results of all pending steps except the last `keep`."""
        while len(self._pending) > keep:
            step, result = self._pending.popleft()
            self.stop, self.save = self.stop or result.stop, self.save or result.save
            if result.applied:
                self.updates, self.skipped_in_a_row = self.updates + 1, 0
                self.averages = [
                    average.after_update(decay) for average, decay in zip(self.averages, self.t.ema_decays, strict=True)
                ]
                self.recent.append(result.norm)
                continue
            self.skipped_in_a_row += 1
            self.diverged = self.diverged or self.skipped_in_a_row >= self.t.max_bad_steps
            first = (step - 1) * self.t.global_batch
            logger.warning(
                "step %d: gradient norm %g is not finite, or a spike; no rank updated; samples %d..%d of the data",
                *(step, result.norm, first, first + self.t.global_batch - 1),
            )
