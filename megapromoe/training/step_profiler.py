"""Profiles some steps of a run: `train.profile=FROM:TO` writes a trace and a memory snapshot of each rank.

    DIR/profile/steps-00000100-00000102/rank-00000.trace.json.gz    for chrome://tracing or ui.perfetto.dev
    DIR/profile/steps-00000100-00000102/rank-00000.memory.pickle    on GPUs, for pytorch.org/memory_viz

On CPUs torch records no memory snapshot; the trace contains each allocation. Profiling reads clocks and allocations
only, so the numbers of training stay the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger(__name__)

FOLDER = "profile"
_MEMORY_EVENTS = 1_000_000  # allocations and releases that a snapshot keeps, the newest ones


class StepProfiler:
    """Profiles the steps of a range on this rank.

    Args:
        steps: numbers of the steps, from 1; empty: nothing is profiled.
        folder: the run directory.
        rank: of this process; rank 0 logs where the results are.
        device: of this process.
        first_step: steps completed before this start.
    """

    def __init__(self, steps: range, folder: Path, rank: int, device: torch.device, first_step: int):
        self._steps, self._rank, self._is_cuda = steps, rank, device.type == "cuda"
        self._profile: profile | None = None
        if not steps:
            return
        self._folder = folder / FOLDER / f"steps-{steps[0]:08d}-{steps[-1]:08d}"
        if first_step >= steps[-1] and rank == 0:
            logger.warning(
                "train.profile: step %d is done already, so nothing is profiled; give later steps", steps[-1]
            )

    def begin(self, step: int) -> None:
        """Called before each step, with its number from 1. Starts the profile if the step is the first one of it."""
        if step not in self._steps or self._profile is not None:
            return
        if self._is_cuda:
            torch.cuda.synchronize()
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_cuda else [])]
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()

    def ends(self, step: int, last: bool) -> bool:
        """Whether `write` is to be called after this step: the range ends, or the run."""
        if self._profile is None:
            return False
        if step >= self._steps[-1] or last:
            return True
        self._profile.step()
        return False

    def write(self) -> None:
        """Ends the profile and writes it. A file that cannot be written is a warning: training continues."""
        assert self._profile is not None, "no profile has begun"
        recorded, self._profile = self._profile, None
        if self._is_cuda:
            torch.cuda.synchronize()
        recorded.stop()
        name = f"rank-{self._rank:05d}"
        written = self._write(self._folder / f"{name}.trace.json.gz", recorded.export_chrome_trace)
        if self._is_cuda:
            self._write(self._folder / f"{name}.memory.pickle", torch.cuda.memory._dump_snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)
        if written and self._rank == 0:
            logger.info("%s: profile of each rank", self._folder)

    def close(self) -> None:
        """Ends a profile whose steps were not completed, without writing it."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        recorded.stop()
        if self._is_cuda:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, path: Path, export: Callable[[str], object]) -> bool:
        """Calls `export` with a temporary name, and renames the file to `path`."""
        unfinished = path.with_name(f"unfinished-{path.name}")  # the profiler compresses a file that ends in .gz
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            export(str(unfinished))
            os.replace(unfinished, path)
        except (OSError, RuntimeError) as error:  # the profiler raises RuntimeError for a file that it cannot open
            logger.warning("%s: cannot be written (%s); training continues", path, error)
            with contextlib.suppress(OSError):
                unfinished.unlink()
            return False
        return True
