"""The training time of a run over all starts, and an estimate of the remaining time."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapromoe.run_lines import elapsed_seconds, metrics_of

logger = logging.getLogger(__name__)


def elapsed_before(manifest: Mapping[str, Any], metrics: Path, global_batch: int) -> float:
    """The training time in seconds at the checkpoint that a start begins from.

    Checkpoints of earlier versions do not contain it; then it is computed from the lines of metrics.jsonl up to that
    step.

    Args:
        manifest: manifest of the checkpoint.
        metrics: path of metrics.jsonl.
        global_batch: images of a step.
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
    """Measures the seconds in which a run trains, saves and samples, without start-up and the time between starts.

    Steps that are repeated, because a start begins from an earlier checkpoint, count once.

    Args:
        before: seconds at the checkpoint that this start begins from, see `elapsed_before`.
        first_step: step of that checkpoint.
        total_steps: steps of the complete run.
    """

    def __init__(self, before: float, first_step: int, total_steps: int):
        self.total_steps = total_steps
        self._before, self._start = before, time.perf_counter()
        self._since = first_step, 0.0  # a completed step of this start, and the time in seconds

    @property
    def of_this_start(self) -> float:
        """Seconds since the first step of this start began."""
        return time.perf_counter() - self._start

    @property
    def elapsed(self) -> float:
        """Seconds over all starts of the run."""
        return self._before + self.of_this_start

    def left(self, step: int) -> float:
        """Estimated seconds from `step` to the last step, by the mean speed of this start.

        Steps before the first call are not used for later estimates, because the first one compiles and allocates.
        """
        (since, then), now = self._since, self.of_this_start
        if then == 0.0:
            self._since = step, now
        return (now - then) / max(1, step - since) * (self.total_steps - step)
