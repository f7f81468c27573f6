"""The benchmark's counters: FLOPs, kernels, memory, host waits and messages of known programs."""

import pytest
import torch
import torch.distributed as dist
from support.processes import run
from torch.nn import functional as F

from megapromoe.benchmark.counters import Counter


def test_counts_of_a_known_program():
    a, b = torch.ones(8, 4), torch.ones(4, 2).requires_grad_()
    with Counter() as counter:
        c = a @ b  # 1 kernel, 8·2 floats
        d = c.view(2, 8).relu()  # 1 kernel, 16 floats
        del c  # relu keeps its result alone
        kept = counter.mark()
        counter.phase("backward")
        d.sum().backward()
    forward, backward = counter.phases["forward"], counter.phases["backward"]
    assert (forward.kernels, forward.allocations, forward.allocated) == (2, 2, 128)
    assert forward.flops == backward.flops == 2 * 8 * 4 * 2
    assert not forward.waits and not forward.collectives and not counter.total.compiled
    assert counter.live(at=kept) == 64  # what relu made


def test_memory_is_counted_while_it_lives():
    with Counter() as counter:
        x = torch.zeros(100)  # 400 bytes
        y = x + 1
        del x
        z = y * 2
        view = z[:10]
        del y, z
        end = counter.mark()
    assert counter.live() == 800 and counter.live(at=end) == 400
    assert counter.live(without=[view]) == 800 and counter.total.allocations == 3
    assert counter.live(at=end, without=[view]) == 0


WAITS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "if": lambda x: bool(x.any()),
    "nonzero": lambda x: torch.nonzero(x),
    "mask": lambda x: x[x > 0],
    "write by mask": lambda x: x.clone().index_put_((x > 0,), torch.zeros(2)),
    "bincount": lambda x: torch.bincount(x.long()),
    "repeat": lambda x: torch.repeat_interleave(x, torch.tensor([1, 2, 3])),
}


FREE = {
    "index": lambda x: x[torch.tensor([0, 2])],
    "repeat of known size": lambda x: torch.repeat_interleave(x, torch.tensor([1, 2, 3]), output_size=6),
    "sum": lambda x: x.sum(),
    "where": lambda x: torch.where(x > 0, x, 0),
}


@pytest.mark.parametrize("what", [*WAITS, *FREE])
def test_waits_of_the_host(what):
    x = torch.tensor([0.0, 1.0, 2.0])
    with Counter() as counter:
        (WAITS | FREE)[what](x)
    assert sum(counter.total.waits.values()) == (what in WAITS), counter.total.waits


def test_products_of_experts_are_counted():
    offs = torch.tensor([2, 2, 6], dtype=torch.int32)
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(3, 8, 4, requires_grad=True)
    with Counter() as counter:
        y = F.grouped_mm(x, w, offs=offs)
        counter.phase("backward")
        y.backward(torch.ones(6, 4))
    assert counter.phases["forward"].flops == 2 * 6 * 8 * 4
    assert counter.phases["backward"].flops == 2 * 2 * 6 * 8 * 4


def messages() -> dict:
    rank, n = dist.get_rank(), dist.get_world_size()
    with Counter() as counter:
        dist.all_reduce(torch.ones(12))
        counter.phase("gather")
        dist.all_gather([torch.ones(5) for _ in range(n)], torch.ones(5))
        counter.phase("even")
        dist.all_to_all_single(torch.empty(2 * n, 3), torch.ones(2 * n, 3))
        counter.phase("uneven")
        rows = [rank, 2]  # to each rank; rank r keeps its own
        send = [rows[0], rows[1]]
        receive = [0 if r == 0 else 1 for r in range(n)] if rank == 0 else [2, 2]
        dist.all_to_all_single(torch.empty(sum(receive), 3), torch.ones(sum(send), 3), receive, send)
    return {name: (sum(c.collectives.values()), sum(c.sent.values())) for name, c in counter.phases.items()}


def test_messages_are_counted():
    for rank, counts in enumerate(run(2, messages)):
        assert counts["forward"] == (1, 48)  # 2·(n-1)/n of 12 floats
        assert counts["gather"] == (1, 20)
        assert counts["even"] == (1, 24)  # half of 4 rows of 3 floats
        assert counts["uneven"] == (1, (2 if rank == 0 else 1) * 12)
