"""The dispatchers against a plain loop over rows: outputs and gradients, for skewed, empty and odd assignments."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from support.backends import BACKENDS
from support.dispatch_cases import (
    KINDS,
    MIXED,
    D,
    E,
    F,
    T,
    assignment_of,
    experts_of,
    onto_zeros,
    outcome,
    plain,
    recorded_messages,
)
from support.processes import run

from megapromoe.config.expert_placement import ExpertPlacement
from megapromoe.distributed.mesh import make_mesh
from megapromoe.nn.moe import expert_linear
from megapromoe.nn.moe.assignment import TokenAssignment
from megapromoe.nn.moe.capacity_dispatcher import CapacityDispatcher
from megapromoe.nn.moe.dispatcher import Dispatcher
from megapromoe.nn.moe.expert_parallel_dispatcher import ExpertParallelDispatcher
from megapromoe.nn.moe.layer import Experts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [T, 1, 0])
def test_local_dispatcher_is_the_loop(kind, tokens, backend):
    if kind == "any rows" and tokens == 0:
        pytest.skip("rows of no token")
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(0))
    assignment, bank = assignment_of(kind, tokens, 1), experts_of(2)
    with BACKENDS[backend]():
        ours = outcome(onto_zeros(Dispatcher(E)), x, assignment, bank)
    if kind == "empty" or tokens == 0:
        assert not ours[0].any() and all(not g.any() for g in ours[1:])
        return
    for a, b in zip(ours, outcome(plain, x, assignment, bank), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "capability, dtype, one_kernel, leaves",
    [
        ((8, 0), torch.bfloat16, False, False),  # A100
        ((9, 0), torch.bfloat16, True, False),  # H100
        ((9, 0), torch.float32, False, False),
        ((10, 3), torch.bfloat16, True, True),  # B300
        ((12, 0), torch.bfloat16, False, False),
    ],
)
def test_which_gpus_have_the_grouped_kernel(capability, dtype, one_kernel, leaves, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    rows = SimpleNamespace(is_cuda=True, is_meta=False, dtype=dtype, device=torch.device("cuda"))
    assert expert_linear.has_grouped_mm_kernel(rows) is one_kernel
    assert expert_linear.grouped_mm_skips_empty_groups(rows) is leaves


def test_experts_without_rows_have_no_gradient_where_the_kernel_writes_none(monkeypatch):
    """As on GPUs of compute capability 10, where a gradient without rows is uninitialised memory."""
    grouped_mm = torch.nn.functional.grouped_mm

    def leaves(a, b, offs):
        out = grouped_mm(a, b, offs=offs)
        if b.dim() == 2:  # a matrix for each group
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = float("nan")
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", leaves)
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(0))
    assignment, bank = assignment_of("one expert", T, 1), experts_of(2)
    with BACKENDS["grouped"]():
        assert all(g.isnan().any() for g in outcome(onto_zeros(Dispatcher(E)), x, assignment, bank)[3:])
        monkeypatch.setattr(expert_linear, "grouped_mm_skips_empty_groups", lambda x: True)
        ours = outcome(onto_zeros(Dispatcher(E)), x, assignment, bank)
    for a, b in zip(ours, outcome(plain, x, assignment, bank), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def distributed(kinds: tuple[str, ...], backend: str, placement: ExpertPlacement) -> list:
    """Each rank has other tokens and another assignment; gradients of an expert are sums over all ranks. Collective."""
    mesh = make_mesh(ep=dist.get_world_size())
    rank, owned = mesh.rank, list(placement.owned(dist.get_rank()))
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(rank))
    assignment, logical_experts = assignment_of(kinds[rank], T, 10 + rank), experts_of(2)
    local_experts = Experts(placement.slots, D, F)
    for local, logical in zip(local_experts.parameters(), logical_experts.parameters(), strict=True):
        local.data.zero_()
        local.data[: len(owned)] = logical.data[owned]
    dispatcher = ExpertParallelDispatcher(E, mesh.ep)
    dispatcher.place_experts(placement)
    with BACKENDS[backend]():
        ours = outcome(onto_zeros(dispatcher), x, assignment, local_experts)
    expected = outcome(plain, x, assignment, logical_experts) if kinds[rank] != "empty" else None
    sums = [p.grad if p.grad is not None else torch.zeros_like(p) for p in logical_experts.parameters()]
    for g in sums:
        dist.all_reduce(g)
    out = []
    if expected:
        out += [(ours[i], expected[i]) for i in range(3)]
    for local, logical in zip(ours[3:], sums, strict=True):
        out.append((local[: len(owned)], logical[owned]))
        out.append((local[len(owned) :], torch.zeros_like(local[len(owned) :])))  # spare slots get no gradient
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kinds", MIXED, ids=", ".join)
def test_expert_parallel_dispatcher_is_the_loop(kinds, backend):
    check_distributed(kinds, backend, ExpertPlacement.contiguous(E, len(kinds)))


PLACED = {2: ((4,), (0, 1, 2, 3, 5)), 4: ((5,), (1, 3), (4,), (0, 2))}  # number of ranks -> the experts of each


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kinds", MIXED, ids=", ".join)
def test_experts_can_be_on_any_ranks(kinds, backend):
    check_distributed(kinds, backend, ExpertPlacement(PLACED[len(kinds)]))


def check_distributed(kinds: tuple[str, ...], backend: str, placement: ExpertPlacement) -> None:
    for pairs in run(len(kinds), distributed, kinds, backend, placement):
        for ours, expected in pairs:
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def traffic(tokens: int) -> dict:
    """The number of collectives and bytes of one layer's forward and backward, top 1. Collective."""
    mesh = make_mesh(ep=dist.get_world_size())
    bank = Experts(ExpertPlacement.contiguous(E, mesh.ep.size).slots, D, F)
    for p in bank.parameters():
        p.data.fill_(0.01)
    calls, sent = [], [0]
    real = dist.all_to_all_single

    def counted(out, x, receive=None, send=None, **options):
        calls.append(x.dtype)
        if send is not None:
            stays = send[mesh.ep.rank]
            sent[0] += (sum(send) - stays) * x[0:1].numel() * x.element_size()
        return real(out, x, receive, send, **options)

    dist.all_to_all_single = counted
    x = torch.randn(tokens, D).requires_grad_()
    # Balanced: each expert gets as many rows of every rank.
    assignment = TokenAssignment(torch.arange(tokens), torch.arange(tokens) % E, torch.ones(tokens).requires_grad_(), 1)
    y = onto_zeros(ExpertParallelDispatcher(E, mesh.ep))(x, assignment, bank)
    forward = (len(calls), sent[0])
    y.sum().backward()
    return {"forward": forward, "backward": (len(calls) - forward[0], sent[0] - forward[1])}


@pytest.mark.parametrize("world", [2, 3])
def test_traffic_is_the_lower_bound(world):
    tokens = 6 * E
    bound = 2 * tokens * D * 4 * (world - 1) // world
    for counts in run(world, traffic, tokens):
        assert counts["forward"] == (3, bound)  # counts, dispatch, combine; routing weights are not sent
        assert counts["backward"] == (2, bound)


class RecordedWork(torch.autograd.Function):
    """Work between the calls of a dispatcher that records when it runs."""

    @staticmethod
    def forward(ctx, x, name, events):
        ctx.events, ctx.name = events, name
        events.append(name)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        ctx.events.append(ctx.name)
        return grad * 2, None, None


def order_of_events(static: bool) -> tuple[list[str], list[str]]:
    """The events of a layer's forward and backward pass, in order: collectives, waits, other work. Collective."""
    mesh = make_mesh(ep=dist.get_world_size())
    placement = ExpertPlacement.contiguous(E, mesh.ep.size)
    events: list[str] = []
    dispatcher = CapacityDispatcher(E, mesh.ep, 1.5) if static else ExpertParallelDispatcher(E, mesh.ep)
    x, assignment = torch.randn(T, D).requires_grad_(), assignment_of("top 1", T, 1)
    experts = Experts(placement.slots, D, F)
    for p in experts.parameters():
        p.data.fill_(0.01)
    with recorded_messages(events):
        dispatched = dispatcher.dispatch(x, assignment, T)
        hidden = RecordedWork.apply(x, "first half", events)
        outputs = dispatcher.run_experts(dispatched, experts)
        y = dispatcher.combine(outputs, RecordedWork.apply(hidden, "second half", events))
        forward = events.copy()
        events.clear()
        y.sum().backward()
    return forward, events


BACKWARD = ["rows", "second half", "wait", "rows", "first half", "wait"]


def test_other_work_overlaps_counts_rows_and_gradients():
    """Only the dispatch all-to-all is waited for at once: it cannot start before the counts are known."""
    for forward, backward in run(2, order_of_events, False):
        assert forward == ["counts", "first half", "rows", "wait", "rows", "second half", "wait"]
        assert backward == BACKWARD


def test_other_work_overlaps_the_equal_parts_of_capacity_dispatch():
    for forward, backward in run(2, order_of_events, True):
        assert forward == ["rows", "first half", "wait", "rows", "second half", "wait"]
        assert backward == BACKWARD
