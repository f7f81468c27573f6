"""The time that a run has trained, over all of its starts, and what is left of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapromoe.run_lines import elapsed_seconds, metrics_of

logger = logging.getLogger(__name__)


def elapsed_before(manifest: Mapping[str, Any], metrics: Path, global_batch: int) -> float:
    """Seconds that a run had trained at the checkpoint it begins from.

    Checkpoints of earlier versions do not have it; it is then read from the lines of metrics.jsonl up to that step.
    """
    if "elapsed_seconds" in manifest:
        return float(manifest["elapsed_seconds"])
    try:
        lines = [line for line in metrics_of(metrics) if line.get("step", 0) <= manifest["step"]]
    except OSError as error:
        logger.warning("%s: cannot be read (%s); the run's clock begins at 0", metrics, error.strerror)
        return 0.0
    return max(elapsed_seconds(lines, global_batch), default=0.0)


class RunClock:
    """Counts the seconds in which a run trains, saves and samples; neither start-up nor the time between two starts.

    Steps that a start repeats, because it begins from an earlier checkpoint, count once.

    Args:
        before: seconds at the checkpoint that this start begins from, see `elapsed_before`.
        first_step: its step.
        total_steps: of the whole run.
    """

    def __init__(self, before: float, first_step: int, total_steps: int):
        self.total_steps = total_steps
        self._before, self._start = before, time.perf_counter()
        self._since = first_step, 0.0  # a step of this start, and when it was done

    @property
    def of_this_start(self) -> float:
        """Seconds since the first step of this start began."""
        return time.perf_counter() - self._start

    @property
    def elapsed(self) -> float:
        """Seconds of the whole run."""
        return self._before + self.of_this_start

    def left(self, step: int) -> float:
        """Seconds until the last step, estimated by the mean speed of this start.

        The steps before the first call are left out of later estimates: the first of them compiles and allocates.
        """
        (since, then), now = self._since, self.of_this_start
        if then == 0.0:
            self._since = step, now
        return (now - then) / max(1, step - since) * (self.total_steps - step)
