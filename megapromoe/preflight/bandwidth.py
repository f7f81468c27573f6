"""Network bandwidth: between pairs of nodes, and of the all-to-all in the expert-parallel groups."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megapromoe.distributed.mesh import Group
from megapromoe.preflight.groups import GroupResult
from megapromoe.preflight.machine import synchronize
from megapromoe.preflight.verdict import FAIL, PASS, SKIP, WARN, Cluster, Limits, Row, nodes_to_blame, upper_median

ALL_PAIRS = 32  # up to this number of nodes, every pair is measured


@dataclass(frozen=True)
class Network:
    """The network measurements of one rank.

    Attributes:
        device: type of the device, "cuda" or "cpu".
        error: the error that ended the measurements early and the step it happened in; "" without an error.
        groups: name of the process group -> result of the collectives in it.
        pairs: other node -> GB/s from this rank to its partner on that node, while both send.
        wrong_pairs: nodes from which wrong bytes were received.
        exchange: GB/s that this rank sends in the all-to-all of its expert-parallel group; 0 in a group of one rank.
        collectives: name of the process group -> operation -> bytes and seconds of a small and of a large message.
    """

    device: str = "cpu"
    error: str = ""
    groups: dict[str, GroupResult] = field(default_factory=dict)
    pairs: dict[str, float] = field(default_factory=dict)
    wrong_pairs: list[str] = field(default_factory=list)
    exchange: float = 0.0
    collectives: dict[str, dict[str, list[float]]] = field(default_factory=dict)


def pair_rounds(nodes: int, all_pairs: int = ALL_PAIRS, seed: int = 0) -> list[list[tuple[int, int]]]:
    """Schedules the pairs of `nodes` nodes in rounds of disjoint pairs, as a round-robin tournament: each pair once.

    With more than `all_pairs` nodes there are `all_pairs` rounds: three for the ring of neighbours, the others drawn at
    random from a tournament.
    """
    if nodes <= all_pairs:
        return _tournament(list(range(nodes)))
    even = nodes - nodes % 2
    ring = [[(i, i + 1) for i in range(0, even, 2)], [(i, (i + 1) % nodes) for i in range(1, nodes - 1, 2)]]
    ring.append([(nodes - 1, 0)])
    order = list(range(nodes))
    generator = random.Random(seed)
    generator.shuffle(order)
    return ring + generator.sample(_tournament(order), all_pairs - len(ring))


def _tournament(players: list[int]) -> list[list[tuple[int, int]]]:
    """A round-robin schedule by the circle method: the first player keeps its seat, the others rotate."""
    seats: list[int | None] = [*players, None] if len(players) % 2 else list(players)
    rounds = []
    for _ in range(len(seats) - 1):
        pairs = zip(seats[: len(seats) // 2], reversed(seats), strict=False)  # first with last, and so on
        rounds.append([(a, b) for a, b in pairs if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def measure_pairs(
    cluster: Cluster, rank: int, device: torch.device, at: Callable[[str], None]
) -> tuple[dict[str, float], list[str]]:
    """Measures the bandwidth between this rank and its partner on each other node. Collective.

    The i-th ranks of two nodes are partners. All of them exchange at the same time, so that every network adapter of a
    node is in use.

    Args:
        at: called with the name of each step.

    Returns:
        Other node -> GB/s in each direction; the nodes from which wrong bytes were received.
    """
    names, own_node = cluster.nodes, cluster.node_of[rank]
    local_index = cluster.ranks_on(own_node).index(rank)
    speeds, wrong = {}, []
    for number, pairs in enumerate(pair_rounds(len(names))):
        at(f"bandwidth, round {number + 1}")
        for a, b in pairs:
            if own_node not in (names[a], names[b]):
                continue
            other = names[b] if own_node == names[a] else names[a]
            partners = cluster.ranks_on(other)
            if local_index < len(partners):
                speeds[other], correct = measure_exchange(partners[local_index], rank, device)
                if not correct:
                    wrong.append(other)
        at(f"the end of bandwidth round {number + 1}")
        dist.all_reduce(torch.zeros(1, device=device))  # a barrier: pairs of two rounds must not share a link
        synchronize(device)
    return speeds, wrong


def measure_exchange(partner: int, rank: int, device: torch.device) -> tuple[float, bool]:
    """GB/s in each direction while both ranks send, and whether the received bytes are correct."""
    size, repeats = (64 * 2**20, 10) if device.type == "cuda" else (4 * 2**20, 4)
    sent = torch.full((size,), rank % 251, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)

    def exchange() -> None:
        operations = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    seconds = _seconds(exchange, repeats, device)
    return size * repeats / seconds / 1e9, bool((received == partner % 251).all())


def measure_all_to_all(group: Group, device: torch.device) -> float:
    """GB/s that this rank sends to the other ranks in an all-to-all of equal parts. Collective in the group."""
    if group.size == 1:
        return 0.0
    size, repeats = (64 * 2**20, 10) if device.type == "cuda" else (4 * 2**20, 4)
    sent = torch.zeros(size // group.size * group.size, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    seconds = _seconds(lambda: dist.all_to_all_single(received, sent, group=group.process_group), repeats, device)
    return len(sent) * (group.size - 1) / group.size * repeats / seconds / 1e9


def _seconds(exchange: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The time of `repeats` exchanges, after one that establishes the connections."""
    exchange()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        exchange()
    synchronize(device)
    return time.perf_counter() - start


# ---- rules


def evaluate_errors(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """Collectives must raise no error.

    If the errors are on one or two nodes, these are blamed. With silent ranks they are not: `evaluate_hang` then blames
    the nodes of the silent ranks.
    """
    if cluster.skipped:
        yield Row("network", tuple(cluster.nodes), cluster.skipped, "", SKIP, "first correct the failures above")
        return
    errors = {r: n.error for r, n in cluster.findings.get("network", {}).items() if n.error}
    if errors:
        nodes = cluster.nodes_of(errors)
        few = len(nodes) <= 2 and set(nodes) != set(cluster.nodes)
        blame = nodes if few and not (cluster.hang and cluster.hang.silent) else ()
        result = "; ".join(f"rank {rank}: {error}" for rank, error in sorted(errors.items())[:3])
        more = f"; and {len(errors) - 3} more ranks" if len(errors) > 3 else ""
        remedy = (
            "check the network adapters, NCCL_SOCKET_IFNAME and the firewall between the nodes; NCCL_DEBUG=WARN prints"
            " details"
        )
        yield Row("network", nodes, result + more, "no error", FAIL, remedy, blame)


def pair_speeds(cluster: Cluster) -> dict[tuple[str, str], float]:
    """GB/s between two nodes: the sum over their ranks, in the slower direction."""
    sums: dict[tuple[str, str], float] = {}
    for rank, network in cluster.findings.get("network", {}).items():
        for other, speed in network.pairs.items():
            direction = (cluster.node_of[rank], other)
            sums[direction] = sums.get(direction, 0.0) + speed
    return {(a, b): min(speed, sums.get((b, a), speed)) for (a, b), speed in sums.items() if a < b}


def evaluate_pairs(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """Every pair of nodes must reach the expected bandwidth, or a share of the usual one.

    The usual bandwidth is the median over nodes of the fastest pair of each node. A median over pairs would not do: one
    slow node out of four makes half of all pairs slow, but lowers only its own maximum. On CPUs a slow pair is a
    warning, unless an expected bandwidth is given.
    """
    networks = cluster.findings.get("network", {})
    wrong = [(cluster.node_of[r], other) for r, network in networks.items() for other in network.wrong_pairs]
    if wrong:
        blame = nodes_to_blame(wrong, cluster.nodes)
        result = "; ".join(f"{a} received wrong bytes from {b}" for a, b in wrong[:4])
        remedy = "check the links and network adapters of these nodes"
        yield Row("bandwidth", blame or tuple(cluster.nodes), result, "exact", FAIL, remedy, blame)
    speeds = pair_speeds(cluster)
    if not speeds:
        if networks and not cluster.hang and not any(network.error for network in networks.values()):
            yield Row("bandwidth", tuple(cluster.nodes), "one node: no pairs", "", SKIP)
        return
    best = {node: max(speed for pair, speed in speeds.items() if node in pair) for pair in speeds for node in pair}
    common = upper_median(best.values())
    if limits.pair_gbps is None:
        limit = limits.pair_share * common
        limit_text = f"{limits.pair_share:.0%} of {common:.3g} GB/s, the usual"
    else:
        limit, limit_text = limits.pair_gbps, f"{limits.pair_gbps:g} GB/s"
    slow = {pair: speed for pair, speed in speeds.items() if speed < limit}
    serious = limits.pair_gbps is not None or any(network.device == "cuda" for network in networks.values())
    blame = nodes_to_blame(slow, cluster.nodes) if serious else ()
    ambiguous = [pair for pair in slow if set(pair) <= set(blame)]
    for pair, speed in sorted(slow.items(), key=lambda item: item[1]):
        if set(pair) & set(blame):
            remedy = "check the adapters, cables and switch ports of the blamed node (ibstat, ethtool)"
            if pair in ambiguous:
                remedy += "; no other pair shows which of the two is at fault"
        elif serious:
            remedy = (
                "all nodes are slow: check the value of --expect-gbs and the network; with a third node the faulty one"
                " can be determined"
            )
        else:
            remedy = "CPU run: the machine or the network may be loaded by other programs; repeat the check"
        blamed = tuple(node for node in pair if node in blame)
        verdict = FAIL if serious else WARN
        yield Row("bandwidth", pair, f"{speed:.3g} GB/s each way", limit_text, verdict, remedy, blamed)
    if not slow and not wrong:
        result = f"{len(speeds)} pairs, {min(speeds.values()):.3g} to {max(speeds.values()):.3g} GB/s each way"
        nodes = len(cluster.nodes)
        if len(speeds) < nodes * (nodes - 1) // 2:
            result += f", of {nodes * (nodes - 1) // 2}: the ring and a random sample"
        yield Row("bandwidth", tuple(cluster.nodes), result, limit_text, PASS)


def evaluate_all_to_all(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """The all-to-all of each expert-parallel group must be about as fast as in the other groups."""
    networks = cluster.findings.get("network", {})
    groups: dict[tuple[int, ...], float] = {}
    for network in networks.values():
        if network.exchange > 0 and "ep" in network.groups:
            ranks = tuple(network.groups["ep"].ranks)
            groups[ranks] = min(network.exchange, groups.get(ranks, network.exchange))
    if not groups:
        return
    common = upper_median(groups.values())
    limit = f"{limits.pair_share:.0%} of {common:.3g} GB/s, the usual"
    slow = {ranks: speed for ranks, speed in groups.items() if speed < limits.pair_share * common}
    serious = any(network.device == "cuda" for network in networks.values())
    for ranks, speed in slow.items():
        nodes = cluster.nodes_of(ranks)
        result = f"ep group of ranks {ranks[0]} to {ranks[-1]}: {speed:.3g} GB/s from each rank"
        remedy = "check NVLink (nvidia-smi nvlink -s) and, if the group spans nodes, the network"
        blame = nodes if serious and len(nodes) == 1 else ()
        yield Row("ep all-to-all", nodes, result, limit, FAIL if serious else WARN, remedy, blame)
    if not slow:
        result = f"{len(groups)} groups, {min(groups.values()):.3g} to {max(groups.values()):.3g} GB/s from each rank"
        yield Row("ep all-to-all", tuple(cluster.nodes), result, limit, PASS)
