"""Copies of experts: a layer with them against the plain loop, how rows are divided, and the messages it sends."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from support.backends import BACKENDS
from support.dispatch_cases import MIXED, D, E, F, T, assignment_of, experts_of, outcome, plain, recorded_messages
from support.placements import with_replicas
from support.processes import run

from megapromoe.config.expert_placement import ExpertPlacement, ReplicatedExpert
from megapromoe.distributed.mesh import make_mesh
from megapromoe.nn.moe.expert_parallel_dispatcher import ExpertParallelDispatcher
from megapromoe.nn.moe.layer import Experts
from megapromoe.nn.moe.replicas import ReplicaExchange, RowSplit

PLACED = {
    2: ExpertPlacement(((4,), (0, 1, 2, 3, 5)), (ReplicatedExpert(4, ((0, 0.25), (1, 0.75))),)),
    4: ExpertPlacement(
        ((5,), (1, 3), (4,), (0, 2)),
        (
            ReplicatedExpert(0, ((0, 0.3), (1, 0.3), (3, 0.4))),
            ReplicatedExpert(4, ((0, 0.25), (1, 0.25), (2, 0.0), (3, 0.5))),
            ReplicatedExpert(5, ((0, 0.5), (1, 0.5))),
        ),
    ),
}


def parts_of(placement: ExpertPlacement, mesh) -> tuple[ExpertParallelDispatcher, ReplicaExchange, Experts]:
    """Dispatcher, exchange and experts of a rank, the experts of `experts_of(2)`."""
    owned, logical_experts = list(placement.owned(mesh.ep.rank)), experts_of(2)
    local_experts = Experts(placement.slots, D, F)
    for local, logical in zip(local_experts.parameters(), logical_experts.parameters(), strict=True):
        local.data.zero_()
        local.data[: len(owned)] = logical.data[owned]
    dispatcher = ExpertParallelDispatcher(E, mesh.ep)
    dispatcher.place_experts(placement)
    return dispatcher, ReplicaExchange(placement, mesh.ep), local_experts


def layer(dispatcher: ExpertParallelDispatcher, exchange: ReplicaExchange):
    def outputs(x, assignment, bank):
        experts = exchange.start(bank, x.dtype)
        dispatched = dispatcher.dispatch(x, assignment, len(x))
        return dispatcher.combine(dispatcher.run_experts(dispatched, experts), torch.zeros_like(x))

    return outputs


def distributed(kinds: tuple[str, ...], backend: str, placement: ExpertPlacement) -> list:
    """Pairs of a result with copies and of the loop; gradients of an expert are sums over all ranks. Collective."""
    mesh = make_mesh(ep=dist.get_world_size())
    rank, owned = mesh.rank, list(placement.owned(dist.get_rank()))
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(rank))
    assignment, logical_experts = assignment_of(kinds[rank], T, 10 + rank), experts_of(2)
    dispatcher, exchange, local_experts = parts_of(placement, mesh)
    with BACKENDS[backend]():
        ours = outcome(layer(dispatcher, exchange), x, assignment, local_experts)
    expected = outcome(plain, x, assignment, logical_experts) if kinds[rank] != "empty" else None
    sums = [p.grad if p.grad is not None else torch.zeros_like(p) for p in logical_experts.parameters()]
    for g in sums:
        dist.all_reduce(g)
    out = [(ours[i], expected[i]) for i in range(3)] if expected else []
    for local, logical in zip(ours[3:], sums, strict=True):
        out.append((local[: len(owned)], logical[owned]))
        out.append((local[len(owned) :], torch.zeros_like(local[len(owned) :])))  # spare slots get no gradient
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kinds", [*MIXED, ("one expert",) * 4], ids=", ".join)
def test_a_layer_with_copies_is_the_loop(kinds, backend):
    for pairs in run(len(kinds), distributed, kinds, backend, PLACED[len(kinds)]):
        for ours, expected in pairs:
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_all_ranks_are_divided_by_the_shares(seed):
    """The order of rows is kept within a host, and all ranks together give each host its share, within a row or two."""
    placement = with_replicas(ExpertPlacement.contiguous(E, 3), seed)
    total = torch.zeros(3 * placement.dispatch_slots, dtype=torch.int64)
    rows_of_expert = torch.zeros(E, dtype=torch.int64)
    for rank in range(3):
        expert_R = torch.randint(E, (50 + rank,), generator=torch.Generator().manual_seed(100 * seed + rank))
        slot_R, order_R = RowSplit(placement, rank).sort_rows(expert_R)
        assert sorted(order_R.tolist()) == list(range(len(expert_R))) and slot_R.tolist() == sorted(slot_R.tolist())
        for expert in range(E):
            hosts = [slot for slot, _ in placement.hosts_of(expert)]
            in_order = [row for slot in hosts for row in order_R[slot_R == slot].tolist()]
            assert in_order == (expert_R == expert).nonzero().flatten().tolist(), "consecutive rows for each host"
        total += slot_R.bincount(minlength=len(total))
        rows_of_expert += expert_R.bincount(minlength=E)
    for rank in range(3):
        for slot, (expert, share) in placement.shares_of_rank(rank).items():
            assert abs(total[rank * placement.dispatch_slots + slot] - share * rows_of_expert[expert]) <= 3


def test_single_rows_of_the_ranks_do_not_all_have_the_same_host():
    placement = ExpertPlacement(((0,), (1,), (2,), (3,)), (ReplicatedExpert(0, ((0, 0.5), (2, 0.5))),))
    slots = [RowSplit(placement, rank).sort_rows(torch.tensor([0]))[0].item() for rank in range(4)]
    assert sorted(slots) == [0, 0, 5, 5]


def traffic(placement: ExpertPlacement) -> tuple[list, list]:
    """(kind, bytes) of the messages of a forward and a backward pass. Collective."""
    mesh = make_mesh(ep=dist.get_world_size())
    dispatcher, exchange, experts = parts_of(placement, mesh)
    x = torch.randn(T, D).requires_grad_()
    sent: list[int] = []
    real = dist.all_to_all_single

    def counted(out, packed, *arguments, **options):
        sent.append(packed.numel() * packed.element_size())
        return real(out, packed, *arguments, **options)

    dist.all_to_all_single = counted
    y = layer(dispatcher, exchange)(x, assignment_of("top 1", T, 1), experts)
    forward = sent.copy()
    sent.clear()
    y.sum().backward()
    return forward, sent


def test_one_message_each_way_with_the_weights_of_the_copies():
    placement, parameters = PLACED[4], 2 * D * F + D + F
    owners = [placement.rank_of_expert[expert] for copies in placement.copies_of_rank for expert in copies]
    for rank, (forward, backward) in enumerate(run(4, traffic, placement)):
        assert len(forward) == 4 and forward[0] == 4 * parameters * owners.count(rank)
        assert len(backward) == 3 and backward[1] == 4 * parameters * len(placement.copies_of_rank[rank])
    assert len(owners) == placement.copies == 6


def order_of_events(placement: ExpertPlacement) -> tuple[list[str], list[str]]:
    mesh = make_mesh(ep=dist.get_world_size())
    events: list[str] = []
    dispatcher, exchange, experts = parts_of(placement, mesh)
    x = torch.randn(T, D).requires_grad_()
    with recorded_messages(events):
        y = layer(dispatcher, exchange)(x, assignment_of("top 1", T, 1), experts)
        forward = events.copy()
        events.clear()
        y.sum().backward()
    return forward, events


def test_weights_and_gradients_of_copies_overlap_rows():
    for forward, backward in run(2, order_of_events, PLACED[2]):
        # Weights, counts, rows; waits for rows and weights; outputs.
        assert forward == ["rows", "counts", "rows", "wait", "wait", "rows", "wait"]
        # Gradients of outputs; those of copies, and of rows, are sent before either is waited for.
        assert backward == ["rows", "wait", "rows", "rows", "wait", "wait"]


def test_without_copies_nothing_changes():
    placement = replace(PLACED[4], replicas=())
    assert placement.dispatch_slots == placement.slots and placement.copies == 0
    assert placement.slot_of_expert == (6, 2, 7, 3, 4, 0)
