"""Runs each collective that training uses in each process group of the layout, and compares with exact results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megapromoe.distributed.mesh import Group, Mesh
from megapromoe.preflight.verdict import FAIL, PASS, SKIP, Cluster, Limits, Row, nodes_to_blame

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
ELEMENTS = 1 << 16  # fp32 elements that a rank contributes

# torch 2.13 renamed these functions and warns about the old names.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class GroupResult:
    """The results of one rank's collectives in one process group.

    Attributes:
        ranks: the ranks of the group.
        wrong_sums: collectives that returned a wrong sum.
        wrong_from: ranks from which wrong values were received.
    """

    ranks: list[int]
    wrong_sums: list[str] = field(default_factory=list)
    wrong_from: list[int] = field(default_factory=list)


def values(rank: int, count: int) -> torch.Tensor:
    """The values (count,) that a rank contributes: small integers, whose fp32 sum is exact in any order."""
    return ((torch.arange(count) * 31 + rank * 17) % 251).float()


def contribution(rank: int, count: int, device: torch.device) -> torch.Tensor:
    """`values` on the device."""
    return values(rank, count).to(device)


def num_rows_sent(sender: int, receiver: int) -> int:
    """Elements that `sender` sends to `receiver` in the uneven all-to-all; 0 for some pairs."""
    return 64 * ((3 * sender + 5 * receiver) % 7)


def check_collective(operation: str, group: Group, device: torch.device) -> tuple[bool, list[int]]:
    """Runs one collective in one group. Collective in the group.

    Returns:
        Whether a sum is wrong, and the ranks from which wrong values were received.
    """
    own_rank, ranks, size, n = group.ranks[group.rank], group.ranks, group.size, ELEMENTS
    if operation == "all_reduce":
        x = contribution(own_rank, n, device)
        dist.all_reduce(x, group=group.process_group)
        return not torch.equal(x.cpu(), sum((values(rank, n) for rank in ranks), torch.zeros(n))), []
    if operation == "all_gather":
        x = torch.empty(size * n, device=device)
        all_gather(x, contribution(own_rank, n, device), group=group.process_group)
        parts = x.cpu().split(n)
        return False, [r for r, part in zip(ranks, parts, strict=True) if not torch.equal(part, values(r, n))]
    if operation == "reduce_scatter":
        x = torch.empty(n, device=device)
        reduce_scatter(x, contribution(own_rank, size * n, device), group=group.process_group)
        start = group.rank * n
        expected = sum((values(rank, size * n)[start : start + n] for rank in ranks), torch.zeros(n))
        return not torch.equal(x.cpu(), expected), []
    send = [num_rows_sent(group.rank, other) for other in range(size)]
    receive = [num_rows_sent(other, group.rank) for other in range(size)]
    x = torch.empty(sum(receive), device=device)
    dist.all_to_all_single(x, contribution(own_rank, sum(send), device), receive, send, group=group.process_group)
    wrong = []
    for other, (rank, part) in enumerate(zip(ranks, x.cpu().split(receive), strict=True)):
        start = sum(num_rows_sent(other, before) for before in range(group.rank))
        if not torch.equal(part, values(rank, start + len(part))[start:]):
            wrong.append(rank)
    return False, wrong


def check_groups(mesh: Mesh, device: torch.device, at: Callable[[str], None]) -> Iterator[tuple[str, GroupResult]]:
    """Checks all collectives in all groups of the layout. Collective.

    Args:
        at: called with the name of each step.

    Yields:
        The name of each group and this rank's result in it.
    """
    for direction, group in mesh.directions.items():
        sums, senders = [], []
        for operation in OPERATIONS:
            at(f"{operation} in {direction}")
            if group.size > 1:
                wrong_sum, wrong_from = check_collective(operation, group, device)
                sums += [operation] * wrong_sum
                senders += wrong_from
        yield direction, GroupResult(list(group.ranks), sums, sorted(set(senders)))


# ---- rules


def evaluate_groups(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """Every collective must return correct values in every group.

    For a wrong value sender and receiver are known, so the node that such pairs have in common is blamed. For a wrong
    sum only the group is known; its node is blamed if the group lies on one node.
    """
    groups_of_rank: dict[int, dict[str, GroupResult]] = {
        rank: network.groups for rank, network in cluster.findings.get("network", {}).items()
    }
    for direction in dict.fromkeys(name for groups in groups_of_rank.values() for name in groups):
        results = {rank: groups[direction] for rank, groups in groups_of_rank.items() if direction in groups}
        bad = {rank: result for rank, result in results.items() if result.wrong_sums or result.wrong_from}
        sizes = sorted({len(result.ranks) for result in results.values()})
        name = f"group {direction}"
        if not results:
            continue
        if not bad:
            count = len({tuple(result.ranks) for result in results.values()})
            summary = f"{count} group{'s' * (count > 1)} of {sizes[0]}"
            if sizes == [1]:
                yield Row(name, tuple(cluster.nodes), f"{summary}: nothing to exchange", "", SKIP)
            else:
                yield Row(name, tuple(cluster.nodes), f"{summary}: {', '.join(OPERATIONS)} correct", "exact", PASS)
            continue
        pairs = [
            (cluster.node_of[sender], cluster.node_of[rank])
            for rank, result in bad.items()
            for sender in result.wrong_from
        ]
        blame = nodes_to_blame(pairs, cluster.nodes)
        by_group: dict[tuple[int, ...], set[str]] = {}
        for result in bad.values():
            by_group.setdefault(tuple(result.ranks), set()).update(result.wrong_sums or ["values"])
        for ranks, wrong in by_group.items():
            nodes = cluster.nodes_of(ranks)
            blamed = tuple(node for node in nodes if node in blame) or (nodes if len(nodes) == 1 else ())
            senders = sorted({sender for r in ranks if r in bad for sender in bad[r].wrong_from})
            description = f"ranks {_listed(ranks)}: wrong {', '.join(sorted(wrong))}"
            if senders:
                description += f"; wrong from rank {_listed(senders)}"
            remedy = "check the links and network adapters of these nodes; NCCL_DEBUG=INFO prints the transport in use"
            yield Row(name, blamed or nodes, description, "exact", FAIL, remedy, blamed)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
