"""How fast the nodes talk: each pair of them, and the expert-parallel groups' all-to-all."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megapromoe.distributed.mesh import Group
from megapromoe.preflight.groups import Heard
from megapromoe.preflight.machine import synchronize
from megapromoe.preflight.verdict import FAIL, PASS, SKIP, WARN, Cluster, Limits, Row, culprits, usual

ALL_PAIRS = 32  # nodes up to which every pair is tried


@dataclass(frozen=True)
class Network:
    """What a rank found on the network.

    Attributes:
        error: what ended it early, and where; "" if nothing did.
        groups: direction -> values that were wrong.
        pairs: other node -> GB/s from this rank to its partner there, while both sent.
        wrong_pairs: other nodes from which other bytes came than were sent.
        exchange: GB/s that left this rank in the all-to-all of its expert-parallel group; 0 if it is alone.
    """

    device: str = "cpu"
    error: str = ""
    groups: dict[str, Heard] = field(default_factory=dict)
    pairs: dict[str, float] = field(default_factory=dict)
    wrong_pairs: list[str] = field(default_factory=list)
    exchange: float = 0.0


def rounds(nodes: int, all_pairs: int = ALL_PAIRS, seed: int = 0) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs of `nodes` nodes. A round-robin tournament meets every pair once.

    With more than `all_pairs` nodes only the ring of neighbours, in three rounds, and as many random rounds of a
    tournament as make `all_pairs` in all.
    """
    if nodes <= all_pairs:
        return _tournament(list(range(nodes)))
    even = nodes - nodes % 2
    ring = [[(i, i + 1) for i in range(0, even, 2)], [(i, (i + 1) % nodes) for i in range(1, nodes - 1, 2)]]
    ring.append([(nodes - 1, 0)])
    order = list(range(nodes))
    draw = random.Random(seed)
    draw.shuffle(order)
    return ring + draw.sample(_tournament(order), all_pairs - len(ring))


def _tournament(players: list[int]) -> list[list[tuple[int, int]]]:
    """The circle method: one player stays, the others turn around it."""
    seats: list[int | None] = [*players, None] if len(players) % 2 else list(players)
    found = []
    for _ in range(len(seats) - 1):
        pairs = zip(seats[: len(seats) // 2], reversed(seats), strict=False)  # the first half with the last, backwards
        found.append([(a, b) for a, b in pairs if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def try_pairs(
    cluster: Cluster, rank: int, device: torch.device, at: Callable[[str], None]
) -> tuple[dict[str, float], list[str]]:
    """GB/s to the partner on each other node, and the nodes whose bytes came wrong. Collective.

    The i-th ranks of two nodes are partners, all at the same time, so that every network adapter of a node is in use.
    """
    names, own = cluster.nodes, cluster.node_of[rank]
    place = cluster.ranks_on(own).index(rank)
    speeds, wrong = {}, []
    for number, pairs in enumerate(rounds(len(names))):
        at(f"bandwidth, round {number + 1}")
        for a, b in pairs:
            if own not in (names[a], names[b]):
                continue
            other = names[b] if own == names[a] else names[a]
            partners = cluster.ranks_on(other)
            if place < len(partners):
                speeds[other], right = exchange_with(partners[place], rank, device)
                if not right:
                    wrong.append(other)
        at(f"the end of bandwidth round {number + 1}")
        dist.all_reduce(torch.zeros(1, device=device))  # the next round's pairs share no wire with this one's
        synchronize(device)
    return speeds, wrong


def exchange_with(partner: int, rank: int, device: torch.device) -> tuple[float, bool]:
    """GB/s each way while both send at once, and whether the partner's bytes came right."""
    size, repeats = (64 * 2**20, 10) if device.type == "cuda" else (4 * 2**20, 4)
    mine = torch.full((size,), rank % 251, dtype=torch.uint8, device=device)
    theirs = torch.empty_like(mine)

    def swap() -> None:
        both = [dist.P2POp(dist.isend, mine, partner), dist.P2POp(dist.irecv, theirs, partner)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    seconds = _seconds(swap, repeats, device)
    return size * repeats / seconds / 1e9, bool((theirs == partner % 251).all())


def try_exchange(group: Group, device: torch.device) -> float:
    """GB/s that leave this rank for the others in an all-to-all of equal parts. Collective in the group."""
    if group.size == 1:
        return 0.0
    size, repeats = (64 * 2**20, 10) if device.type == "cuda" else (4 * 2**20, 4)
    sent = torch.zeros(size // group.size * group.size, dtype=torch.uint8, device=device)
    got = torch.empty_like(sent)
    seconds = _seconds(lambda: dist.all_to_all_single(got, sent, group=group.process_group), repeats, device)
    return len(sent) * (group.size - 1) / group.size * repeats / seconds / 1e9


def _seconds(exchange: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The time of `repeats` exchanges, after one that connects."""
    exchange()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        exchange()
    synchronize(device)
    return time.perf_counter() - start


# ---- rules


def judge_errors(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """Collectives that raised. One or two nodes are blamed, unless ranks fell silent: then these are, elsewhere."""
    if cluster.skipped:
        yield Row("network", tuple(cluster.nodes), cluster.skipped, "", SKIP, "repair what failed above first")
        return
    errors = {r: n.error for r, n in cluster.found.get("network", {}).items() if n.error}
    if errors:
        nodes = cluster.nodes_of(errors)
        few = len(nodes) <= 2 and set(nodes) != set(cluster.nodes)
        blame = nodes if few and not (cluster.hang and cluster.hang.silent) else ()
        told = "; ".join(f"rank {rank}: {error}" for rank, error in sorted(errors.items())[:3])
        more = f"; and {len(errors) - 3} more ranks" if len(errors) > 3 else ""
        remedy = "NCCL_DEBUG=WARN says more; see the adapters, NCCL_SOCKET_IFNAME and the firewall between the nodes"
        yield Row("network", nodes, told + more, "no error", FAIL, remedy, blame)


def pair_speeds(cluster: Cluster) -> dict[tuple[str, str], float]:
    """GB/s each way between two nodes: over all their ranks, in the slower direction."""
    sums: dict[tuple[str, str], float] = {}
    for rank, network in cluster.found.get("network", {}).items():
        for other, speed in network.pairs.items():
            direction = (cluster.node_of[rank], other)
            sums[direction] = sums.get(direction, 0.0) + speed
    return {(a, b): min(speed, sums.get((b, a), speed)) for (a, b), speed in sums.items() if a < b}


def judge_pairs(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """Every pair of nodes is as fast as expected, or as others are.

    What is usual is the median over nodes of the best that each reaches: a bad node spoils its own best only, but half
    of all pairs among four nodes. Without a GPU a slow pair is a warning, unless a speed was asked for.
    """
    found = cluster.found.get("network", {})
    wrong = [(cluster.node_of[r], other) for r, network in found.items() for other in network.wrong_pairs]
    if wrong:
        blame = culprits(wrong, cluster.nodes)
        told = "; ".join(f"{a} got wrong bytes from {b}" for a, b in wrong[:4])
        remedy = "see the links and adapters of these nodes"
        yield Row("bandwidth", blame or tuple(cluster.nodes), told, "exact", FAIL, remedy, blame)
    speeds = pair_speeds(cluster)
    if not speeds:
        if found and not cluster.hang and not any(network.error for network in found.values()):
            yield Row("bandwidth", tuple(cluster.nodes), "one node: no pair to try", "", SKIP)
        return
    best = {node: max(speed for pair, speed in speeds.items() if node in pair) for pair in speeds for node in pair}
    common = usual(best.values())
    if limits.pair_gbps is None:
        limit = limits.pair_share * common
        told_limit = f"{limits.pair_share:.0%} of {common:.3g} GB/s, the usual"
    else:
        limit, told_limit = limits.pair_gbps, f"{limits.pair_gbps:g} GB/s"
    slow = {pair: speed for pair, speed in speeds.items() if speed < limit}
    serious = limits.pair_gbps is not None or any(network.device == "cuda" for network in found.values())
    blame = culprits(slow, cluster.nodes) if serious else ()
    unsure = [pair for pair in slow if set(pair) <= set(blame)]
    for pair, speed in sorted(slow.items(), key=lambda item: item[1]):
        if set(pair) & set(blame):
            remedy = "see the adapters, cables and switch ports of the blamed node (ibstat, ethtool)"
            if pair in unsure:
                remedy += "; which of the two it is, no other pair tells"
        elif serious:
            remedy = "every node would be to blame: is --expect-gbps right, or the fabric slow? A third node may tell"
        else:
            remedy = "no GPU: other programs on the machine slow it, or the network does; try again"
        own = tuple(node for node in pair if node in blame)
        yield Row("bandwidth", pair, f"{speed:.3g} GB/s each way", told_limit, FAIL if serious else WARN, remedy, own)
    if not slow and not wrong:
        told = f"{len(speeds)} pairs, {min(speeds.values()):.3g} to {max(speeds.values()):.3g} GB/s each way"
        nodes = len(cluster.nodes)
        if len(speeds) < nodes * (nodes - 1) // 2:
            told += f", of {nodes * (nodes - 1) // 2}: the ring and a random sample"
        yield Row("bandwidth", tuple(cluster.nodes), told, told_limit, PASS)


def judge_exchange(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """The all-to-all of each expert-parallel group is about as fast as in the other groups."""
    found = cluster.found.get("network", {})
    groups: dict[tuple[int, ...], float] = {}
    for network in found.values():
        if network.exchange > 0 and "ep" in network.groups:
            ranks = tuple(network.groups["ep"].ranks)
            groups[ranks] = min(network.exchange, groups.get(ranks, network.exchange))
    if not groups:
        return
    common = usual(groups.values())
    limit = f"{limits.pair_share:.0%} of {common:.3g} GB/s, the usual"
    slow = {ranks: speed for ranks, speed in groups.items() if speed < limits.pair_share * common}
    serious = any(network.device == "cuda" for network in found.values())
    for ranks, speed in slow.items():
        nodes = cluster.nodes_of(ranks)
        said = f"ep group of ranks {ranks[0]} to {ranks[-1]}: {speed:.3g} GB/s from each rank"
        remedy = "see NVLink (nvidia-smi nvlink -s) and, where the group spans nodes, the network"
        blame = nodes if serious and len(nodes) == 1 else ()
        yield Row("ep all-to-all", nodes, said, limit, FAIL if serious else WARN, remedy, blame)
    if not slow:
        told = f"{len(groups)} groups, {min(groups.values()):.3g} to {max(groups.values()):.3g} GB/s from each rank"
        yield Row("ep all-to-all", tuple(cluster.nodes), told, limit, PASS)
