"""Paired timing: contenders run interleaved, so that other load on the machine affects all of them equally.

Every round runs each contender once, in a new random order. Ratios are computed within a round; their median has a
bootstrap interval. Warm-up rounds are not recorded.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

RESAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True)
class Work:
    """What a contender runs in a round: `prepare`, which is not timed, and then the timed phases (name -> function)."""

    phases: Mapping[str, Callable[[], None]]
    prepare: Callable[[], None] = lambda: None


class Clock(Protocol):
    """Times the phases of a `Work`."""

    def time(self, phases: Mapping[str, Callable[[], None]]) -> dict[str, float]:
        """Runs the phases in order; returns the seconds of each."""


class CpuClock:
    """CPU time of this process (`process`), summed over its threads, or wall-clock time; in seconds.

    CPU time does not include that of other programs, but it equals the duration only with one thread.
    """

    def __init__(self, process: bool):
        self.read = time.process_time if process else time.perf_counter

    def time(self, phases: Mapping[str, Callable[[], None]]) -> dict[str, float]:
        seconds = {}
        for name, run in phases.items():
            start = self.read()
            run()
            seconds[name] = self.read() - start
        return seconds


class GpuClock:
    """Seconds between events on the GPU's stream; the host waits for the GPU only before the first and after all."""

    def time(self, phases: Mapping[str, Callable[[], None]]) -> dict[str, float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for run, event in zip(phases.values(), events[1:], strict=True):
            run()
            event.record()
        torch.cuda.synchronize()
        return {
            name: start.elapsed_time(stop) / 1000
            for name, start, stop in zip(phases, events[:-1], events[1:], strict=True)
        }


def make_clock(device: torch.device, threads: int) -> Clock:
    """CUDA events on a GPU; on a CPU the CPU time of the process with one thread, wall-clock time with more."""
    return GpuClock() if device.type == "cuda" else CpuClock(process=threads == 1)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios within rounds, and the bounds of its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


Samples = dict[str, dict[str, list[float]]]
"""contender -> phase -> seconds of each round."""


def interleave(
    works: Mapping[str, Work],
    rounds: int,
    clock: Clock,
    warmup: int = 1,
    seed: int = 0,
) -> Samples:
    """Runs every contender once in each round, in random order; returns the seconds without the warm-up rounds."""
    if rounds < 1:
        raise ValueError(f"rounds: {rounds} is below 1")
    shuffle = random.Random(seed)
    samples: Samples = {name: {phase: [] for phase in work.phases} for name, work in works.items()}
    for number in range(warmup + rounds):
        for name in shuffle.sample(list(works), len(works)):
            works[name].prepare()
            seconds = clock.time(works[name].phases)
            if number >= warmup:
                for phase, value in seconds.items():
                    samples[name][phase].append(value)
    return samples


def total_seconds(phases: Mapping[str, Sequence[float]]) -> list[float]:
    """Seconds of all phases together, for each round."""
    return [sum(values) for values in zip(*phases.values(), strict=True)]


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of the values."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return Spread(float(median), float(low), float(high))


def paired_ratio(values: Sequence[float], reference: Sequence[float], seed: int = 0) -> Ratio:
    """The median of `values` over `reference`, round by round, with its 95 % bootstrap interval."""
    ratios = np.asarray(values) / np.asarray(reference)
    resampled = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[resampled], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def summary(samples: Samples, reference: str | None) -> dict[str, dict]:
    """For each contender: spread of each phase and of their total, and the ratio of the total to the reference's."""
    totals = {name: total_seconds(phases) for name, phases in samples.items()}
    result: dict[str, dict[str, Any]] = {}
    for name, phases in samples.items():
        result[name] = {"seconds": {phase: asdict(spread(values)) for phase, values in phases.items()}}
        result[name]["total"] = asdict(spread(totals[name]))
        result[name]["rounds"] = {phase: list(values) for phase, values in phases.items()}
        if reference in totals:
            result[name]["ratio"] = asdict(paired_ratio(totals[name], totals[reference]))
    return result
