"""What the host knows of the steps of a run: which were applied, and whether the run may go on."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megapromoe.checkpoint.average import Average, average_at_start
from megapromoe.config.options import TrainConfig
from megapromoe.engine.step_result import StepResult

logger = logging.getLogger(__name__)

RECENT, ENOUGH = 100, 20  # norms of applied steps that `train.spike` compares with, at most and at least


def largest_norm(spike: float, recent: Sequence[float]) -> float:
    """The gradient norm above which a step is skipped: `spike` medians of `recent` norms, once there are enough."""
    return spike * statistics.median(recent) if spike and len(recent) >= ENOUGH else math.inf


class SaveClock:
    """When a checkpoint is due by `train.save_minutes`. Rank 0's clock decides; other ranks never ask.

    The request travels with the gradient norm, so every rank sees it after the same step, and none waits for it.
    """

    def __init__(self, minutes: float, rank: int, now: Callable[[], float] = time.monotonic):
        """Args: `minutes`: 0 for never; `now`: seconds."""
        self._seconds, self._now = 60 * minutes if rank == 0 else 0.0, now
        self._since = now()

    def due(self) -> bool:
        """Whether the last save began so long ago."""
        return self._seconds > 0 and self._now() - self._since >= self._seconds

    def restart(self) -> None:
        """A save begins now."""
        self._since = self._now()


class Progress:
    """The steps that were done. It looks at each when the next is under way, so that the device never waits.

    Attributes:
        updates: steps that were applied; one whose gradient is not finite is a step, but no update.
        recent: gradient norms of the last applied steps.
        average: the averaged weights after these updates.
        stop: any rank was asked to stop.
        save: a checkpoint is due by the clock.
        skipped_in_a_row: the last steps that were not applied.
        diverged: `train.max_bad_steps` in a row were not applied.
    """

    def __init__(self, t: TrainConfig, manifest: Mapping[str, Any]):
        """Args: `manifest`: of the checkpoint that the run was filled from; empty for a new run."""
        self.t = t
        self.updates: int = manifest.get("updates", 0)
        self.average = average_at_start(Average.of(manifest) if "updates" in manifest else None, t)
        self.recent = deque(manifest.get("recent_norms", []), maxlen=RECENT)
        skipped = manifest.get("skipped_in_a_row", 0)
        # A run that ended for this reason goes on when it is started again: with other settings, or behind bad data.
        self.skipped_in_a_row: int = skipped if skipped < t.max_bad_steps else 0
        self.stop = self.diverged = self.save = False
        self._behind: deque[tuple[int, StepResult]] = deque()  # not looked at

    def add(self, step: int, result: StepResult) -> None:
        """Takes in a step, and looks at those before; at this one too if something waits for it."""
        self._behind.append((step, result))
        regular = (self.t.log_every, self.t.sample_every, self.t.save_every, self.t.snapshot_every)
        wanted = step == self.t.steps or self.t.spike or any(every and step % every == 0 for every in regular)
        self._look(behind=0 if wanted else 1)
        if self.stop or self.diverged or self.save:
            self._look(behind=0)

    def saved(self) -> None:
        """A checkpoint of the last step that was taken in has begun: none is due, whoever asked until then."""
        self.save = False

    def metadata(self) -> dict[str, Any]:
        """For the manifest of a checkpoint of the last step; it must have been looked at."""
        return {
            "updates": self.updates,
            "recent_norms": list(self.recent),
            "skipped_in_a_row": self.skipped_in_a_row,
            **self.average.metadata(),
        }

    def _look(self, behind: int) -> None:
        while len(self._behind) > behind:
            step, result = self._behind.popleft()
            self.stop, self.save = self.stop or result.stop, self.save or result.save
            if result.applied:
                self.updates, self.skipped_in_a_row = self.updates + 1, 0
                self.average = self.average.after_update(self.t.ema)
                self.recent.append(result.norm)
                continue
            self.skipped_in_a_row += 1
            self.diverged = self.diverged or self.skipped_in_a_row >= self.t.max_bad_steps
            first = (step - 1) * self.t.global_batch
            logger.warning(
                "step %d: gradient norm %g is not finite, or a spike; no rank updated; samples %d..%d of the data",
                *(step, result.norm, first, first + self.t.global_batch - 1),
            )
