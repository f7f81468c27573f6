"""Differences between the clocks of the nodes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from megapromoe.distributed.store_channel import StoreChannel
from megapromoe.preflight.verdict import PASS, WARN, Cluster, Limits, Row

PINGS = 10


@dataclass(frozen=True)
class Clock:
    """A node's clock minus that of rank 0's node, in seconds, ± `uncertainty`."""

    offset: float
    uncertainty: float


def now() -> float:
    """This node's clock, in seconds."""
    return time.time()


def compare_clocks(channel: StoreChannel, leaders: list[int]) -> Clock | None:
    """Measures each node's clock against that of rank 0, on the first rank of the node; None elsewhere. Collective.

    The messages use the store directly and not the channel, whose thread would add to the measured round trips. The
    store's own time-out limits the waits.

    Source: Cristian's algorithm. Rank 0's reading is half a round trip old, ± half a round trip; the shortest of
    `PINGS` round trips counts.
    """
    if channel.rank == 0:
        for rank in leaders:
            for ping in range(PINGS if rank else 0):
                channel.store.get(f"ask/{rank}/{ping}")
                channel.store.set(f"answer/{rank}/{ping}", repr(now()))
        return Clock(0.0, 0.0)
    if channel.rank not in leaders:
        return None
    clocks = []
    for ping in range(PINGS):
        local_time, start = now(), time.perf_counter()
        channel.store.set(f"ask/{channel.rank}/{ping}", "")
        rank0_time = float(channel.store.get(f"answer/{channel.rank}/{ping}"))
        half = (time.perf_counter() - start) / 2
        clocks.append(Clock(local_time + half - rank0_time, half))
    return min(clocks, key=lambda clock: clock.uncertainty)


def evaluate_clocks(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """Clocks should agree. A difference only makes logs and file times hard to read, so it is a warning."""
    clocks: dict[str, Clock] = {
        cluster.node_of[rank]: clock for rank, clock in cluster.findings.get("clock", {}).items()
    }
    if not clocks:
        return
    limit = f"{limits.skew:g} s"
    off = {node: clock for node, clock in clocks.items() if abs(clock.offset) - clock.uncertainty > limits.skew}
    for node, clock in off.items():
        result = f"{clock.offset:+.3f} s ± {clock.uncertainty:.3f}"
        yield Row("clock", (node,), result, limit, WARN, "set the clock; check that chrony or ntpd runs on the node")
    if not off:
        offset = max(abs(clock.offset) for clock in clocks.values())
        uncertainty = max(clock.uncertainty for clock in clocks.values())
        yield Row("clock", tuple(clocks), f"at most {offset:.3f} s ± {uncertainty:.3f} apart", limit, PASS)
