"""Timing that compares: contenders take turns, so that whatever else the machine does meets all of them alike.

Every round runs each contender once, in an order shuffled anew. Ratios are taken within a round and only then
summarised, with a bootstrap interval of their median. Warm-up rounds are run and forgotten.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

RESAMPLES = 2000


@dataclass(frozen=True)
class Work:
    """One contender's turn: `prepare` is not timed, the phases (name -> function) are, one after the other."""

    phases: Mapping[str, Callable[[], None]]
    prepare: Callable[[], None] = lambda: None


class Clock(Protocol):
    """Times the phases of one turn."""

    def time(self, phases: Mapping[str, Callable[[], None]]) -> dict[str, float]:
        """Seconds of each phase, which are run in order."""


class CpuClock:
    """Seconds of this process (`process`: of all its threads together, whoever else uses the machine) or of the wall.

    Time of the process is the fair one on a shared machine, but only with one thread.
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
    """Seconds between events on the GPU's stream; the host waits for it before and after, never in between."""

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
    """Events on a GPU; on a CPU the process's time with one thread, the wall's with more."""
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
    """Runs every contender once in each round, in a random order; returns the seconds of all but the warm-up rounds."""
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


def whole(phases: Mapping[str, Sequence[float]]) -> list[float]:
    """Seconds of each round's phases together."""
    return [sum(values) for values in zip(*phases.values(), strict=True)]


def spread(values: Sequence[float]) -> Spread:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return Spread(float(median), float(low), float(high))


def paired_ratio(values: Sequence[float], reference: Sequence[float], seed: int = 0) -> Ratio:
    """`values` over `reference`, round by round."""
    ratios = np.asarray(values) / np.asarray(reference)
    drawn = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def summary(samples: Samples, reference: str | None) -> dict[str, dict]:
    """Per contender: spread of each phase and of the whole, and the ratio of the whole to the reference's."""
    totals = {name: whole(phases) for name, phases in samples.items()}
    said: dict[str, dict[str, Any]] = {}
    for name, phases in samples.items():
        said[name] = {"seconds": {phase: asdict(spread(values)) for phase, values in phases.items()}}
        said[name]["total"] = asdict(spread(totals[name]))
        said[name]["rounds"] = {phase: list(values) for phase, values in phases.items()}
        if reference in totals:
            said[name]["ratio"] = asdict(paired_ratio(totals[name], totals[reference]))
    return said
