"""Whose clock is off."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from megapromoe.distributed.store_channel import StoreChannel
from megapromoe.preflight.verdict import PASS, WARN, Cluster, Limits, Row

PINGS = 10


@dataclass(frozen=True)
class Clock:
    """Seconds that a node's clock is ahead of rank 0's, give or take `uncertainty`."""

    offset: float
    uncertainty: float


def now() -> float:
    """This node's clock, seconds."""
    return time.time()


def compare_clocks(channel: StoreChannel, leaders: list[int]) -> Clock | None:
    """What each node's first rank finds about its clock; None on the others. All ranks call it.

    The round trips are timed, so they go to the store itself, whose waits its own time-out ends.

    Source: Cristian's method: the answer was given half a round trip ago, give or take as much; of some round trips the
    shortest.
    """
    if channel.rank == 0:
        for rank in leaders:
            for ping in range(PINGS if rank else 0):
                channel.store.get(f"ask/{rank}/{ping}")
                channel.store.set(f"told/{rank}/{ping}", repr(now()))
        return Clock(0.0, 0.0)
    if channel.rank not in leaders:
        return None
    clocks = []
    for ping in range(PINGS):
        asked, start = now(), time.perf_counter()
        channel.store.set(f"ask/{channel.rank}/{ping}", "")
        told = float(channel.store.get(f"told/{channel.rank}/{ping}"))
        half = (time.perf_counter() - start) / 2
        clocks.append(Clock(asked + half - told, half))
    return min(clocks, key=lambda clock: clock.uncertainty)


def judge_clocks(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """Clocks that differ make logs and file times hard to read, no worse: a warning."""
    clocks: dict[str, Clock] = {cluster.node_of[rank]: clock for rank, clock in cluster.found.get("clock", {}).items()}
    if not clocks:
        return
    limit = f"{limits.skew:g} s"
    off = {node: clock for node, clock in clocks.items() if abs(clock.offset) - clock.uncertainty > limits.skew}
    for node, clock in off.items():
        said = f"{clock.offset:+.3f} s ± {clock.uncertainty:.3f}"
        yield Row("clock", (node,), said, limit, WARN, "set the clock: is chrony or ntpd running there?")
    if not off:
        most = max(abs(clock.offset) for clock in clocks.values())
        unsure = max(clock.uncertainty for clock in clocks.values())
        yield Row("clock", tuple(clocks), f"at most {most:.3f} s ± {unsure:.3f} apart", limit, PASS)
