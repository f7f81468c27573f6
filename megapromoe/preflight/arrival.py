"""Which ranks came, and which of them answer: the rules that blame a node for a missing or a hanging rank."""

from __future__ import annotations

import time
from collections.abc import Iterator

from megapromoe.distributed.store_channel import PAUSE, StoreChannel
from megapromoe.preflight.verdict import FAIL, PASS, Cluster, Limits, Row


def roll_call(
    channel: StoreChannel, node: str, local_world: int, patience: float
) -> tuple[dict[int, str], dict[str, int]]:
    """Reports that this rank is there, as one of `local_world` on its node. Called by all ranks.

    Returns rank -> node of those that came within `patience` seconds, and node -> ranks that should have come from
    these nodes.
    """
    channel.send(f"here/{channel.rank}", [node, local_world])
    if channel.rank == 0:
        deadline = time.monotonic() + patience
        arrived: dict[int, list] = {}
        while len(arrived) < channel.world and time.monotonic() < deadline:
            for rank in range(channel.world):
                if rank not in arrived and (message := channel.receive_if_sent(f"here/{rank}")) is not None:
                    arrived[rank] = message
            time.sleep(PAUSE)
        channel.send("arrived", [[rank, *arrived[rank]] for rank in sorted(arrived)])
    arrivals = channel.receive("arrived")
    return {rank: node for rank, node, _ in arrivals}, {node: local for _, node, local in arrivals}


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
    said = f"hung in '{hang.place}': {_listed(sorted(late))} {'silent' if hang.silent else 'not finished'}"
    remedy = "look at that node: a stopped process, a dead device or mount, a link that is down"
    if not sure:
        remedy = (
            "nothing tells who holds up the others: a switch, a mount or a setting in common, or --timeout too short"
        )
    yield Row("answers", nodes, said, "--timeout", FAIL, remedy, nodes if sure else ())
