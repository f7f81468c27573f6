"""Where the ranks meet before they can trust a collective: who came, messages, and whose clock is off.

All goes through the job's key-value store, which needs no GPU, no NCCL and no group.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.distributed import Store

from megapromoe.preflight.verdict import FAIL, PASS, WARN, Cluster, Limits, Row

PAUSE = 0.01  # seconds between two looks at the store
PINGS = 10


@dataclass(frozen=True)
class Clock:
    """Seconds that a node's clock is ahead of rank 0's, give or take `uncertainty`."""

    offset: float
    uncertainty: float


class Meeting:
    """The ranks' messages to one another. Waits have no end of their own: the watch ends a check that hangs."""

    def __init__(self, store: Store, rank: int, world: int):
        self.store, self.rank, self.world = store, rank, world

    def roll_call(self, node: str, local_world: int, patience: float) -> tuple[dict[int, str], dict[str, int]]:
        """Says that this rank is here, as one of `local_world` on its node.

        Returns rank -> node of those that came within `patience` seconds, and node -> ranks that should have come from
        these nodes.
        """
        self.say(f"here/{self.rank}", [node, local_world])
        if self.rank == 0:
            end, came = time.monotonic() + patience, set()
            while len(came) < self.world and time.monotonic() < end:
                came |= {r for r in range(self.world) if r not in came and self.store.check([f"here/{r}"])}
                time.sleep(PAUSE)
            self.say("came", [[r, *self.hear(f"here/{r}")] for r in sorted(came)])
        came = self.hear("came")
        return {rank: node for rank, node, _ in came}, {node: local for _, node, local in came}

    def say(self, name: str, value: Any) -> None:
        """Leaves a message, JSON, for whoever hears it."""
        self.store.set(name, json.dumps(value))

    def hear(self, name: str) -> Any:
        """Waits for a message and returns it."""
        while not self.store.check([name]):
            time.sleep(PAUSE)
        return json.loads(self.store.get(name))

    def heard(self, name: str) -> Any | None:
        """The message if it is there, else None."""
        return json.loads(self.store.get(name)) if self.store.check([name]) else None

    def together(self, name: str, count: int) -> None:
        """Waits until `count` ranks have come here."""
        self.store.add(name, 1)
        while self.store.add(name, 0) < count:
            time.sleep(PAUSE)


def now() -> float:
    """This node's clock, seconds."""
    return time.time()


def compare_clocks(meeting: Meeting, leaders: list[int]) -> Clock | None:
    """What each node's first rank finds about its clock; None on the others. All ranks call it.

    Source: Cristian's method: the answer was given half a round trip ago, give or take as much; of some round trips the
    shortest.
    """
    if meeting.rank == 0:
        for rank in leaders:
            for ping in range(PINGS if rank else 0):
                meeting.store.get(f"ask/{rank}/{ping}")
                meeting.store.set(f"told/{rank}/{ping}", repr(now()))
        return Clock(0.0, 0.0)
    if meeting.rank not in leaders:
        return None
    clocks = []
    for ping in range(PINGS):
        asked, start = now(), time.perf_counter()
        meeting.store.set(f"ask/{meeting.rank}/{ping}", "")
        told = float(meeting.store.get(f"told/{meeting.rank}/{ping}"))
        half = (time.perf_counter() - start) / 2
        clocks.append(Clock(asked + half - told, half))
    return min(clocks, key=lambda clock: clock.uncertainty)


def judge_arrival(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """Every rank must have come. The launcher, or neighbours that came, tell on which node a missing one should be."""
    missing = [rank for rank in range(cluster.world) if rank not in cluster.node_of]
    came = f"{len(cluster.node_of)} of {cluster.world} ranks"
    if not missing:
        yield Row("arrival", tuple(cluster.nodes), came, "all", PASS)
        return
    here = {node: len(cluster.ranks_on(node)) for node in cluster.nodes}
    absent = tuple(node for node, count in cluster.expected.items() if here.get(node, 0) < count)
    remedy = "see whether the node is up, reaches rank 0's port, and starts Python in time (--timeout)"
    if not absent:
        remedy += "; the launcher does not say where these ranks should be"
    said = f"{came}; missing: {_listed(missing)}"
    yield Row("arrival", absent, said, "all", FAIL, remedy, absent)


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:16]))}{', ...' * (len(ranks) > 16)}"


def judge_answers(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """A check that hung is blamed on the silent, or else on those furthest behind if they are of two nodes at most.

    Where a collective raised on some ranks, the others wait for those, and are not to blame.
    """
    if (hang := cluster.hang) is None:
        return
    late = hang.silent or hang.behind
    nodes = cluster.nodes_of(late)
    raised = any(network.error for network in cluster.found.get("network", {}).values())
    sure = hang.silent or not raised and len(nodes) <= 2 and set(nodes) != set(cluster.nodes)
    said = f"hung in '{hang.stage}': {_listed(sorted(late))} {'silent' if hang.silent else 'not finished'}"
    remedy = "look at that node: a stopped process, a dead device or mount, a link that is down"
    if not sure:
        remedy = (
            "nothing tells who holds up the others: a switch, a mount or a setting in common, or --timeout too short"
        )
    yield Row("answers", nodes, said, "--timeout", FAIL, remedy, nodes if sure else ())


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
