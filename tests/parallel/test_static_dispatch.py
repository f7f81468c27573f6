"""Capacity dispatch: with slots for all rows it equals the dropless one, else it keeps the first rows; no host sync."""

import pytest
import torch
import torch.distributed as dist
from support.backends import BACKENDS
from support.dispatch_cases import KINDS, D, E, F, T, assignment_of, experts_of, onto_zeros, outcome, plain
from support.processes import run
from support.trajectory import small

from megapromoe.config.expert_placement import ExpertPlacement
from megapromoe.config.options import ConfigError
from megapromoe.config.resolve import resolve
from megapromoe.distributed.mesh import Group, make_mesh
from megapromoe.nn.dit import DiT
from megapromoe.nn.moe.capacity_dispatcher import CapacityDispatcher
from megapromoe.nn.moe.dispatcher import Dispatcher
from megapromoe.nn.moe.layer import Experts
from megapromoe.nn.parallelize import apply_parallelism, build

ONE_RANK = Group((0,), 0)
SLOTS_FOR_ALL = 2.0 * E  # capacity factor: no row is dropped even if all go to one expert and a token has two


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_with_slots_for_all_rows_it_is_the_loop(kind, backend):
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(0))
    assignment, bank = assignment_of(kind, T, 1), experts_of(2)
    dispatcher = CapacityDispatcher(E, ONE_RANK, SLOTS_FOR_ALL)
    with BACKENDS[backend]():
        ours = outcome(onto_zeros(dispatcher), x, assignment, bank)
    assert dropped_by(dispatcher, x, assignment, bank) == 0
    if kind == "empty":
        assert all(not g.any() for g in ours)
        return
    for a, b in zip(ours, outcome(plain, x, assignment, bank), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def dropped_by(dispatcher, x, assignment, bank):
    return dispatcher.run_experts(dispatcher.dispatch(x, assignment, len(x)), bank).dropped


def first_rows(assignment, tokens_per_expert: int):
    """The assignment without the rows after the first `tokens_per_expert` of each expert."""
    count_E, kept = [0] * E, []
    for row, expert in enumerate(assignment.expert_R.tolist()):
        kept += [row] if count_E[expert] < tokens_per_expert else []
        count_E[expert] += 1
    return assignment._replace(
        **{k: getattr(assignment, k)[kept] for k in ("token_R", "expert_R", "weight_R")}, top_k=0
    )


@pytest.mark.parametrize("factor", [0.25, 1.0, 1.5])
@pytest.mark.parametrize("kind", ["top 1", "top 2", "one expert", "any rows"])
def test_rows_past_the_capacity_are_dropped(kind, factor):
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(0))
    assignment, bank = assignment_of(kind, T, 1), experts_of(2)
    dispatcher = CapacityDispatcher(E, ONE_RANK, factor)
    kept = first_rows(assignment, dispatcher.tokens_per_expert(T * max(assignment.top_k, 1)))
    ours = outcome(onto_zeros(dispatcher), x, assignment, bank)
    dropped = dropped_by(dispatcher, x, assignment, bank)
    assert dropped.item() == pytest.approx(1 - len(kept.token_R) / len(assignment.token_R))
    if factor < 1:
        assert dropped > 0
    theirs = outcome(plain, x, kept, bank)
    for a, b in zip(ours[:2] + ours[3:], theirs[:2] + theirs[3:], strict=True):  # weights only of rows that are kept
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def traffic(placement: ExpertPlacement) -> list:
    """What ranks with different numbers of rows send. Collective."""
    mesh = make_mesh(1, dist.get_world_size(), timeout=60)
    bank, rank = experts_of(2), dist.get_rank()
    experts = Experts(placement.slots, D, F)
    for p, logical in zip(experts.parameters(), bank.parameters(), strict=True):
        p.data.zero_()
        owned = list(placement.owned(rank))
        p.data[: len(owned)] = logical.data[owned]
    tokens = T - 5 * rank  # null images take the rest of the micro-batch
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(rank))
    assignment = assignment_of("top 1", tokens, rank)
    sent, real = [], dist.all_to_all_single

    def recorded(out, source, *splits, **options):
        sent.append((source.numel(), splits, options))
        return real(out, source, *splits, **options)

    dist.all_to_all_single = recorded
    try:
        dispatcher = CapacityDispatcher(E, mesh.ep, SLOTS_FOR_ALL)
        dispatcher.place_experts(placement)
        base = torch.zeros(T, D)
        x.requires_grad_()
        y = dispatcher.combine(dispatcher.run_experts(dispatcher.dispatch(x, assignment, T), experts), base)
        forward = len(sent)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    finally:
        dist.all_to_all_single = real
    expected = plain(x.detach(), assignment, bank)
    torch.testing.assert_close(y[:tokens].detach(), expected, rtol=1e-5, atol=1e-5)
    assert not y[tokens:].any()
    return [forward, len(sent) - forward, {n for n, _, _ in sent}, placement.slots * dispatcher.tokens_per_expert(T)]


PLACEMENTS = [
    ExpertPlacement.contiguous(E, 2),
    ExpertPlacement.contiguous(E, 4),
    ExpertPlacement(((5,), (1, 3), (4,), (0, 2))),
    ExpertPlacement(((4,), (0, 1, 2, 3, 5))),
]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: str(placement.experts_of_rank))
def test_ranks_exchange_equal_parts_and_no_counts(placement):
    world = placement.ep
    for forward, backward, sizes, rows in run(world, traffic, placement):
        assert (forward, backward) == (2, 2)
        assert sizes == {world * rows * D}


@pytest.mark.parametrize("factor", [0.0, 1.25])
@pytest.mark.parametrize("top_k", [1, 2])
def test_on_one_device_nothing_is_read_back(factor, top_k):
    """On meta tensors, which have no values, every operation that would read one from a GPU raises."""
    config = resolve("promoe_s", overrides=[f"model.top_k={top_k}", f"model.capacity_factor={factor}"])
    with torch.device("meta"):
        model = DiT(config.model).train().bfloat16()  # torch has grouped_mm of meta tensors only in bf16
        apply_parallelism(model, make_mesh(1, 1, timeout=60))
        images, labels = torch.zeros(4, 4, 32, 32), torch.zeros(4, dtype=torch.long)
        prediction, auxiliary = model(images, torch.zeros(4), labels, 3)
        (prediction.sum() + auxiliary.total()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("router", ["promoe_linear", "classification", "kmeans", "tc"])
def test_with_a_capacity_no_router_reads_back(router):
    """The same for a small model with each other router of token choice, and the loss of its training."""
    config = small(f"model.router={router}", "model.capacity_factor=1.25", "model.score_function=identity")
    with torch.device("meta"):
        model = DiT(config.model).train().bfloat16()
        apply_parallelism(model, make_mesh(1, 1, timeout=60))
        images, labels = torch.zeros(4, 4, 8, 8), torch.zeros(4, dtype=torch.long)
        prediction, auxiliary = model(images, torch.zeros(4), labels, 3)
        (prediction.sum() + auxiliary.total()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_check_for_syncs_detects_one():
    with pytest.raises(RuntimeError, match="meta tensors"):
        torch.zeros(3, device="meta").sum().item()


def test_capacity_is_for_token_choice():
    with pytest.raises(ConfigError, match="capacity_factor = 1.0: must be 0 with model.router = 'ec'"):
        small("model.router=ec", "model.capacity_factor=1.0")


def test_the_capacity_factor_selects_the_dispatcher():
    assert type(build(small()).blocks[1].mlp.dispatcher) is Dispatcher
    model = build(small("model.capacity_factor=1.0")).eval()
    images, labels = torch.randn(4, 4, 8, 8), torch.zeros(4, dtype=torch.long)
    assert model(images, torch.ones(4), labels, 4)[1].dropped_M.shape == (2,)
