"""Which ranks have started and which still respond: the rules that blame a node for a missing or hanging rank."""

from __future__ import annotations

import time
from collections.abc import Iterator

from megapromoe.distributed.store_channel import PAUSE, StoreChannel
from megapromoe.preflight.verdict import FAIL, PASS, Cluster, Limits, Row


def gather_arrivals(
    channel: StoreChannel, node: str, local_world: int, patience: float
) -> tuple[dict[int, str], dict[str, int]]:
    """Registers this rank and collects the registrations of all ranks. Collective.

    Args:
        node: name of this rank's node.
        local_world: ranks on this node.
        patience: seconds to wait for the other ranks.

    Returns:
        rank -> node, of the ranks that registered in time; node -> expected number of ranks, of these nodes.
    """
    channel.send(f"started/{channel.rank}", [node, local_world])
    if channel.rank == 0:
        deadline = time.monotonic() + patience
        arrived: dict[int, list] = {}
        while len(arrived) < channel.world and time.monotonic() < deadline:
            for rank in range(channel.world):
                if rank not in arrived and (message := channel.receive_if_sent(f"started/{rank}")) is not None:
                    arrived[rank] = message
            time.sleep(PAUSE)
        channel.send("arrived", [[rank, *arrived[rank]] for rank in sorted(arrived)])
    arrivals = channel.receive("arrived")
    return {rank: node for rank, node, _ in arrivals}, {node: local for _, node, local in arrivals}


def evaluate_arrival(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """Every rank must have started.

    The node of a missing rank is known from the launcher, or from other ranks of the same node.
    """
    missing = [rank for rank in range(cluster.world) if rank not in cluster.node_of]
    summary = f"{len(cluster.node_of)} of {cluster.world} ranks"
    if not missing:
        yield Row("arrival", tuple(cluster.nodes), summary, "all", PASS)
        return
    started = {node: len(cluster.ranks_on(node)) for node in cluster.nodes}
    absent = tuple(node for node, count in cluster.expected.items() if started.get(node, 0) < count)
    remedy = "check that the node is up, can reach rank 0's port, and starts Python in time (--timeout)"
    if not absent:
        remedy += "; the launcher gives no node for these ranks"
    yield Row("arrival", absent, f"{summary}; missing: {_listed(missing)}", "all", FAIL, remedy, absent)


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:16]))}{', ...' * (len(ranks) > 16)}"


def evaluate_hang(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """A hang is blamed on the nodes of the silent ranks.

    Without a silent rank it is blamed on the ranks furthest behind, if they are on two nodes at most. If a collective
    raised an error on some ranks, the ranks that are behind only wait for these and are not blamed.
    """
    if (hang := cluster.hang) is None:
        return
    late = hang.silent or hang.behind
    nodes = cluster.nodes_of(late)
    raised = any(network.error for network in cluster.findings.get("network", {}).values())
    certain = hang.silent or not raised and len(nodes) <= 2 and set(nodes) != set(cluster.nodes)
    result = f"hung in '{hang.place}': {_listed(sorted(late))} {'silent' if hang.silent else 'not finished'}"
    if certain:
        remedy = "check that node for a stopped process, a dead device or mount, or a link that is down"
    else:
        remedy = (
            "the faulty node cannot be determined: check what the nodes have in common (switch, mount, settings), or"
            " raise --timeout"
        )
    yield Row("answers", nodes, result, "--timeout", FAIL, remedy, nodes if certain else ())
