"""A static step: with a capacity factor and strata of dropped labels, neither a shape nor a host read depends on data.

Two training steps are compared operator by operator, with the shapes and numbers of all arguments: one on the stream,
one whose images are all equal and of one class, so that all tokens choose the same experts.
"""

from functools import cache
from typing import Any

import pytest
import torch
from support.backends import BACKENDS
from support.levels import full
from support.operator_trace import TracedStep, difference, traced_steps
from support.processes import run

from megapromoe.config.model_options import (
    BATCH_CHOICE_ROUTERS,
    EXPERT_CHOICE_ROUTERS,
    GUIDED_ROUTERS,
    ROUTERS,
    UNROUTED,
)

Case = tuple[str, tuple[str, ...]]
"""Implementation of experts, and overrides."""
Compared = tuple[str, TracedStep, TracedStep]
"""The first difference of two steps, empty if there is none, and both without their operators."""

STRATIFIED = ("data.condition_dropout=0.25", "data.condition_dropout_stratum=4")
# Independent dropout, with a seed for which the two steps have different numbers of null images.
INDEPENDENT_DROPOUT = ("data.condition_dropout=0.25", "data.seed=3")
CAPACITY = ("model.capacity_factor=1.25",)
# DeepSpeed reads its overflow flag, a tensor that is on the host on every machine.
HOST_TENSOR = {"update": {"_local_scalar_dense": 1}}


def compare(cases: list[Case]) -> list[Compared]:
    """Compares two steps of each case. Collective."""
    results = []
    for backend, overrides in cases:
        with BACKENDS[backend]():
            a, b = traced_steps(("train.deepspeed=bf16_zero1", *overrides))
        assert min(len(a.calls), len(b.calls)) > 300
        results.append((difference(a, b), a, b))
        a.calls, b.calls = [], []
    return results


@cache
def compared(world: int, cases: tuple[Case, ...]) -> list[dict[Case, Compared]]:
    """For each rank: case -> what `compare` returns."""
    return [dict(zip(cases, rank, strict=True)) for rank in run(world, compare, list(cases))]


def case(*overrides: str, backend: str = "grouped", dropout: tuple[str, ...] = STRATIFIED) -> Case:
    return backend, (*overrides, *dropout)


def name(what: Any) -> str:
    """The id of a case; other parameters as they are."""
    if not isinstance(what, tuple):
        return str(what)
    return " ".join((what[0], *(o.partition(".")[2] for o in what[1] if o not in (*STRATIFIED, *CAPACITY))))


def check_data_differ(ranks: list[Compared], top_k: int) -> None:
    """Both steps are applied. In the second all tokens choose one expert, and more rows are dropped."""
    for _, a, b in ranks:
        assert a.applied and b.applied and a.load_ME != b.load_ME and 0 <= a.dropped < b.dropped
        assert all(max(load_E) == sum(load_E) / top_k for load_E in b.load_ME)


def check_static(ranks: list[Compared], what: Case) -> None:
    for first_difference, a, b in ranks:
        assert first_difference == ""
        assert a.reads == b.reads == HOST_TENSOR
    if set(INDEPENDENT_DROPOUT) <= {*what[1]}:
        assert any(a.null != b.null for _, a, b in ranks)
    else:
        assert all(a.null == b.null and all(a.null) for _, a, b in ranks)


QUICK = case("model.router=promoe", "model.top_k=2", *CAPACITY, backend="looped")
OTHERS = (*UNROUTED, *EXPERT_CHOICE_ROUTERS, *BATCH_CHOICE_ROUTERS)
TOKEN_CHOICE = [router for router in ROUTERS if router not in OTHERS]
ALL = tuple(
    case(f"model.router={router}", f"model.top_k={k}", *CAPACITY)
    for router in TOKEN_CHOICE
    for k in ((1,) if router in GUIDED_ROUTERS else (1, 2))
)
SETTINGS = (
    case(*CAPACITY, "model.balance_weight=0.1", "parallel.recompute=all"),
    case(*CAPACITY, "model.balance_weight=0.1", "model.balance_form=sequence", "model.batch_scope=rank"),
    case(*CAPACITY, "model.router=tc", dropout=INDEPENDENT_DROPOUT),  # has no unconditional expert
    case(*CAPACITY, "model.unconditional_expert=false", "train.accumulation=2", "train.deepspeed=fp32_zero2"),
)
EP, TP = ("parallel.ep=2",), ("parallel.tp=2", "parallel.ep=2", "parallel.recompute=blocks")


def on(layout: tuple[str, ...], cases: tuple[Case, ...]) -> tuple[Case, ...]:
    return tuple((backend, (*overrides, *layout)) for backend, overrides in cases)


# Cases that one job runs, with its number of ranks. The quick level runs those of one case.
GROUPS = {
    "one rank": (1, (QUICK,)),
    "ep 2": (2, on(EP, (QUICK,))),
    "one rank, more": (1, (*ALL, *SETTINGS)),
    "ep 2, more": (2, (*on(EP, (*ALL, *SETTINGS)), *on(TP, (QUICK,)))),
}


@pytest.mark.parametrize(
    "group, what",
    [
        (full if len(GROUPS[group][1]) > 1 else pytest.param)(group, what)
        for group in GROUPS
        for what in GROUPS[group][1]
    ],
    ids=name,
)
def test_a_step_with_a_capacity_factor_is_static(group, what):
    """For every router that allows a capacity factor, on one rank and over an ep group."""
    ranks = [rank[what] for rank in compared(*GROUPS[group])]
    check_static(ranks, what)
    check_data_differ(ranks, 2 if "model.top_k=2" in what[1] else 1)


def compare_fused() -> Compared:
    with torch.compiler.set_stance("force_eager"):  # its operators are traced, not its kernel
        return compare([case(*CAPACITY, "train.adamw_backend=fused")])[0]


@pytest.mark.full
def test_with_a_fused_update_the_host_reads_nothing():
    """Not even DeepSpeed's overflow flag."""
    first_difference, a, b = run(1, compare_fused)[0]
    assert first_difference == "" and a.reads == b.reads == {}


DROPLESS = (
    *(case(f"model.router={router}") for router in ("promoe", "promoe_ec")),
    *(case(f"model.router={router}", dropout=INDEPENDENT_DROPOUT) for router in ("dense", "tc", "ec")),
)


@pytest.mark.full
@pytest.mark.parametrize("what", DROPLESS, ids=name)
def test_without_a_capacity_factor_a_step_is_static_on_one_rank(what):
    """With grouped products, for routers that assign a fixed number of rows.

    Models without unconditional experts need no strata either: null images are not separated.
    """
    check_static([rank[what] for rank in compared(1, DROPLESS)], what)


# Steps that are not static: the reads of the host, and whether operators and shapes differ as well.
INDEPENDENT = case(*CAPACITY, dropout=INDEPENDENT_DROPOUT)
LAYERS = 2  # with experts
OTHERS = {
    1: {
        INDEPENDENT: (HOST_TENSOR, True),
        case("model.router=promoe", backend="looped"): ({"forward": {"tolist": LAYERS}, **HOST_TENSOR}, True),
        case("model.router=diffmoe"): ({"forward": {"nonzero": LAYERS}, **HOST_TENSOR}, False),
        case(*CAPACITY, "train.deepspeed=fp32_zero0"): (
            {"update": {"tolist": 1, "from host": 1}},  # the second is a tensor that stays on the host
            True,
        ),
    },
    2: {
        case("model.router=promoe", *EP): ({"forward": {"tolist": LAYERS}, **HOST_TENSOR}, True),
        case("model.router=promoe_ec", *EP): ({"forward": {"tolist": LAYERS}, **HOST_TENSOR}, False),
    },
}


@pytest.mark.parametrize(
    "world, what",
    [(1, INDEPENDENT), *(full(world, what) for world in OTHERS for what in OTHERS[world] if what != INDEPENDENT)],
    ids=name,
)
def test_the_trace_detects_what_is_not_static(world, what):
    """Independent dropout, row counts that the host reads, and at ZeRO-0 the norm by which it clips."""
    reads, differs = OTHERS[world][what]
    cases = (what,) if what == INDEPENDENT else tuple(case for case in OTHERS[world] if case != INDEPENDENT)
    for first_difference, a, b in (rank[what] for rank in compared(world, cases)):
        assert a.reads == b.reads == reads
        assert bool(first_difference) == differs, first_difference
        assert (a.null != b.null) == (what == INDEPENDENT)
