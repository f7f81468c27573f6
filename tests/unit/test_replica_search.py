"""The search for copies of experts: near the best shares of all, never worse than without, as few as needed."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from support.levels import full

from megapromoe.config.expert_placement import ExpertPlacement, ReplicatedExpert
from megapromoe.planning import replica_search
from megapromoe.planning.placement_search import fullest_over_mean, fullest_over_mean_of_records, rank_loads
from megapromoe.planning.replica_search import TARGET, fewest_replicas, replicate_experts


def test_shares_divide_the_rows_of_an_expert():
    placement = ExpertPlacement(((0, 1), (2,)), (ReplicatedExpert(0, ((0, 0.25), (1, 0.75))),))
    assert rank_loads(np.array([[8, 2, 3], [4, 0, 0]]), placement).tolist() == [[4, 9], [1, 3]]
    counts = np.array([[[8, 2, 3]], [[4, 0, 0]], [[0, 0, 0]]])
    ratio, of_records = fullest_over_mean_of_records(counts, [placement])
    assert ratio == fullest_over_mean(counts, [placement]) == 12 / 8.5 and of_records.tolist() == [9 / 6.5, 3 / 2]


def best_share(count_E: np.ndarray, placement: ExpertPlacement) -> float:
    """The lowest fullest over mean with at most one copy on each of two ranks, of all experts and shares in 1/50."""
    best = fullest_over_mean(count_E[None, None], [placement])
    owned = [[None, *placement.owned(rank)] for rank in (1, 0)]  # what rank 0, and what rank 1, may copy
    for copies in product(*owned):
        for shares in product(np.linspace(0, 1, 51), repeat=sum(copy is not None for copy in copies)):
            left, replicas = list(shares), []
            for rank, expert in enumerate(copies):
                if expert is not None:
                    share = left.pop()
                    hosts = {rank: share, 1 - rank: 1 - share}
                    replicas.append(ReplicatedExpert(expert, tuple(sorted(hosts.items()))))
            tried = replace(placement, replicas=tuple(sorted(replicas)))
            best = min(best, fullest_over_mean(count_E[None, None], [tried]))
    return best


@pytest.mark.parametrize("seed", [0, full(1), full(2), full(3)])
def test_on_small_cases_it_is_as_good_as_all_shares_that_were_tried(seed):
    count_E = np.random.default_rng(seed).gamma(0.5, size=4) * 1000 + 1
    placement = ExpertPlacement.contiguous(4, 2)
    (copied,) = replicate_experts(count_E[None, None], [placement], 1)
    assert fullest_over_mean(count_E[None, None], [copied]) <= best_share(count_E, placement) + 0.02
    assert copied.replica_slots <= 1


def skewed(experts: int, noise: float, records: int = 40, layers: int = 2) -> np.ndarray:
    draw = np.random.default_rng(experts)
    rows_ME = draw.gamma(0.7, size=(layers, experts))
    return np.round(1000 * rows_ME * draw.gamma(1 / noise, noise, size=(records, layers, experts))) + 1


@pytest.mark.parametrize("experts, ep", [(12, 4), (16, 8), (48, 8)])
def test_it_is_never_worse_than_without_copies_and_mostly_much_better(experts, ep):
    count_NME = skewed(experts, noise=0.005)
    plain = [ExpertPlacement.contiguous(experts, ep)] * 2
    before = [fullest_over_mean(count_NME[:, [layer]], plain[:1]) for layer in range(2)]
    for number in (1, 2):
        copied = replicate_experts(count_NME, plain, number)
        for layer, placement in enumerate(copied):
            assert placement.experts_of_rank == plain[0].experts_of_rank and placement.replica_slots <= number
            for expert, shares in placement.replicas:
                ranks = dict(shares)
                assert sum(ranks.values()) == pytest.approx(1) and placement.rank_of_expert[expert] in ranks
            after = fullest_over_mean(count_NME[:, [layer]], [placement])
            assert after < before[layer] and after - 1 < 0.5 * (before[layer] - 1)


def test_as_few_copies_as_reach_the_target():
    count_NME = skewed(16, noise=0.001)
    plain = [ExpertPlacement.contiguous(16, 8)] * 2
    assert fullest_over_mean(count_NME, plain) > 1.5
    copied = fewest_replicas(count_NME, plain)
    assert fullest_over_mean(count_NME, copied) <= TARGET
    number = max(placement.replica_slots for placement in copied)
    assert number >= 1
    fewer = replicate_experts(count_NME, plain, number - 1)
    assert fullest_over_mean(count_NME, fewer) > TARGET


def test_memory_limits_the_copies(monkeypatch):
    monkeypatch.setattr(replica_search, "TARGET", 1.0)
    count_NME = skewed(16, noise=0.001)
    plain = (ExpertPlacement.contiguous(16, 8),) * 2
    numbers: list[int] = []

    def fits(number: int) -> bool:
        numbers.append(number)
        return number < 2

    copied = fewest_replicas(count_NME, plain, fits)
    assert numbers == [1, 2] and max(placement.replica_slots for placement in copied) == 1
    assert fewest_replicas(count_NME, plain, lambda number: False) == plain


def test_balanced_loads_or_none_need_no_copies():
    plain = (ExpertPlacement.contiguous(12, 4),) * 2
    for count_NME in (np.ones((2, 2, 12)), np.zeros((2, 2, 12)), np.zeros((0, 2, 12))):
        assert replicate_experts(count_NME, plain, 2) == plain == fewest_replicas(count_NME, plain)


def test_one_expert_with_all_rows_is_divided_over_all_ranks():
    count_NME = np.zeros((1, 1, 4))
    count_NME[..., 0] = 1000
    (copied,) = replicate_experts(count_NME, [ExpertPlacement.contiguous(4, 4)], 1)
    assert copied.copies_of_rank == ((), (0,), (0,), (0,))
    assert fullest_over_mean(count_NME, [copied]) == pytest.approx(1, abs=0.01)
