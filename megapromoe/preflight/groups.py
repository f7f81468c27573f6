"""Every process group of the layout, every collective that training uses, with values that are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megapromoe.distributed.mesh import Group, Mesh
from megapromoe.preflight.verdict import FAIL, PASS, SKIP, Cluster, Limits, Row, culprits

DIRECTIONS = ("whole", "tp", "dp", "ep", "edp")
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
ELEMENTS = 1 << 16  # of a rank's part

# torch 2.13 gave them new names and warns of the old.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Heard:
    """What a rank got in one group.

    Attributes:
        ranks: the group.
        wrong_sums: operations whose sums were wrong.
        wrong_from: ranks whose own values arrived wrong.
    """

    ranks: list[int]
    wrong_sums: list[str] = field(default_factory=list)
    wrong_from: list[int] = field(default_factory=list)


def values(rank: int, count: int) -> torch.Tensor:
    """What a rank contributes: small whole numbers, so that fp32 sums them exactly in any order."""
    return ((torch.arange(count) * 31 + rank * 17) % 251).float()


def contribution(rank: int, count: int, device: torch.device) -> torch.Tensor:
    return values(rank, count).to(device)


def rows_between(sender: int, receiver: int) -> int:
    """Rows of the uneven exchange, some of them none."""
    return 64 * ((3 * sender + 5 * receiver) % 7)


def try_operation(operation: str, group: Group, device: torch.device) -> tuple[bool, list[int]]:
    """One collective in one group: whether a sum came out wrong, and the ranks whose values arrived wrong."""
    me, ranks, size, n = group.ranks[group.rank], group.ranks, group.size, ELEMENTS
    if operation == "all_reduce":
        x = contribution(me, n, device)
        dist.all_reduce(x, group=group.process_group)
        return not torch.equal(x.cpu(), sum((values(rank, n) for rank in ranks), torch.zeros(n))), []
    if operation == "all_gather":
        x = torch.empty(size * n, device=device)
        _all_gather(x, contribution(me, n, device), group=group.process_group)
        parts = x.cpu().split(n)
        return False, [r for r, part in zip(ranks, parts, strict=True) if not torch.equal(part, values(r, n))]
    if operation == "reduce_scatter":
        x = torch.empty(n, device=device)
        _reduce_scatter(x, contribution(me, size * n, device), group=group.process_group)
        start = group.rank * n
        expected = sum((values(rank, size * n)[start : start + n] for rank in ranks), torch.zeros(n))
        return not torch.equal(x.cpu(), expected), []
    send = [rows_between(group.rank, other) for other in range(size)]
    receive = [rows_between(other, group.rank) for other in range(size)]
    x = torch.empty(sum(receive), device=device)
    dist.all_to_all_single(x, contribution(me, sum(send), device), receive, send, group=group.process_group)
    wrong = []
    for other, (rank, part) in enumerate(zip(ranks, x.cpu().split(receive), strict=True)):
        start = sum(rows_between(other, before) for before in range(group.rank))
        if not torch.equal(part, values(rank, start + len(part))[start:]):
            wrong.append(rank)
    return False, wrong


def try_groups(mesh: Mesh, device: torch.device, at: Callable[[str], None]) -> Iterator[tuple[str, Heard]]:
    """Each direction with what this rank got in it. `at` is told each operation. Collective."""
    for direction in DIRECTIONS:
        group: Group = getattr(mesh, direction)
        sums, senders = [], []
        for operation in OPERATIONS:
            at(f"{operation} in {direction}")
            if group.size > 1:
                wrong_sum, wrong_from = try_operation(operation, group, device)
                sums += [operation] * wrong_sum
                senders += wrong_from
        yield direction, Heard(list(group.ranks), sums, sorted(set(senders)))


# ---- rules


def judge_groups(cluster: Cluster, limits: Limits) -> Iterator[Row]:
    """Every collective gives right values in every group.

    Values that arrive wrong tell sender and receiver, so the node that such pairs have in common is to blame; a sum
    that is wrong tells only the group, which is blamed if it lies on one node.
    """
    found: dict[int, dict[str, Heard]] = {r: n.groups for r, n in cluster.found.get("network", {}).items()}
    if not found:
        return
    for direction in DIRECTIONS:
        heard = {rank: groups[direction] for rank, groups in found.items() if direction in groups}
        bad = {rank: one for rank, one in heard.items() if one.wrong_sums or one.wrong_from}
        sizes = sorted({len(one.ranks) for one in heard.values()})
        name = f"group {direction}"
        if not heard:
            continue
        if not bad:
            count = len({tuple(one.ranks) for one in heard.values()})
            told = f"{count} group{'s' * (count > 1)} of {sizes[0]}"
            if sizes == [1]:
                yield Row(name, tuple(cluster.nodes), f"{told}: nothing to exchange", "", SKIP)
            else:
                yield Row(name, tuple(cluster.nodes), f"{told}: {', '.join(OPERATIONS)} right", "exact", PASS)
            continue
        pairs = [
            (cluster.node_of[sender], cluster.node_of[rank]) for rank, one in bad.items() for sender in one.wrong_from
        ]
        blame = culprits(pairs, cluster.nodes)
        by_group: dict[tuple[int, ...], set[str]] = {}
        for one in bad.values():
            by_group.setdefault(tuple(one.ranks), set()).update(one.wrong_sums or ["values"])
        for ranks, wrong in by_group.items():
            nodes = cluster.nodes_of(ranks)
            own = tuple(node for node in nodes if node in blame) or (nodes if len(nodes) == 1 else ())
            senders = sorted({sender for r in ranks if r in bad for sender in bad[r].wrong_from})
            said = f"ranks {_listed(ranks)}: wrong {', '.join(sorted(wrong))}"
            if senders:
                said += f"; wrong from rank {_listed(senders)}"
            remedy = "see the links and adapters of these nodes; NCCL_DEBUG=INFO names the path it takes"
            yield Row(name, own or nodes, said, "exact", FAIL, remedy, own)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
