"""The search for a placement: the best of all on small cases, never worse than consecutive experts."""

from itertools import product

import numpy as np
import pytest

from megapromoe.config.expert_placement import ExpertPlacement
from megapromoe.planning.placement_search import fullest_over_mean, place_experts, rank_loads


def cost(count_NE: np.ndarray, lists, nodes: int) -> float:
    """What a placement costs by the definition, record by record."""
    total = 0.0
    for count_E in count_NE:
        loads = [sum(count_E[expert] for expert in owned) for owned in lists]
        per_node = len(lists) // nodes
        of_nodes = [sum(loads[n * per_node : (n + 1) * per_node]) for n in range(nodes)]
        mean = sum(loads) / len(loads)
        total += max(loads) / mean + (max(of_nodes) / (mean * per_node) if nodes > 1 else 0)
    return total / len(count_NE)


def lowest_cost(count_NE: np.ndarray, ep: int, slots: int, nodes: int) -> float:
    """The lowest cost of all placements, tried one by one."""
    costs = []
    for ranks in product(range(ep), repeat=count_NE.shape[1]):
        lists = [[expert for expert, rank in enumerate(ranks) if rank == r] for r in range(ep)]
        if all(1 <= len(owned) <= slots for owned in lists):
            costs.append(cost(count_NE, lists, nodes))
    return min(costs)


SMALL_CASES = [
    (4, 2, 2, 1),
    (6, 2, 3, 1),
    (6, 2, 5, 1),
    (6, 3, 2, 1),
    (6, 4, 2, 1),
    (6, 4, 2, 2),
    (7, 3, 4, 1),
    (5, 4, 2, 4),
]


@pytest.mark.parametrize("experts, ep, slots, nodes", SMALL_CASES)
def test_on_small_cases_it_is_the_best_of_all(experts, ep, slots, nodes):
    draw = np.random.default_rng(experts + 10 * ep + 100 * slots + nodes)
    for records in (1, 3):
        skew_E = draw.gamma(0.5, size=experts)
        count_NE = np.round(1000 * skew_E * draw.gamma(5, size=(records, experts))) + 1
        (placement,) = place_experts(count_NE[:, None], ep, slots, nodes)
        lists = placement.experts_of_rank
        assert sorted(sum(lists, ())) == list(range(experts)) and min(map(len, lists)) >= 1
        assert placement.slots <= slots
        assert cost(count_NE, lists, nodes) == pytest.approx(lowest_cost(count_NE, ep, slots, nodes), rel=1e-6)


def test_it_is_never_worse_than_consecutive_experts_and_mostly_better():
    """Also with as many records that they are added up, whose order is a drift."""
    draw = np.random.default_rng(0)
    before, after = [], []
    for experts, ep in ((12, 4), (16, 8), (48, 8)):
        start_ME, end_ME = draw.gamma(0.7, size=(2, 3, experts))
        mix_N = np.linspace(0, 1, 40)[:, None, None]
        count_NME = 1000 * ((1 - mix_N) * start_ME + mix_N * end_ME)
        placements = place_experts(count_NME, ep)
        consecutive = [ExpertPlacement.contiguous(experts, ep)] * 3
        assert all(placement.slots == experts // ep or experts % ep for placement in placements)
        before.append(fullest_over_mean(count_NME, consecutive))
        after.append(fullest_over_mean(count_NME, placements))
    assert all(b <= a for a, b in zip(before, after, strict=True))
    assert np.mean(after) - 1 < 0.6 * (np.mean(before) - 1)


def test_nodes_are_balanced_where_ranks_alone_would_not_be():
    """Two hot experts fill a rank each: over nodes they belong on different ones."""
    count_NME = np.array([[[40, 40, 5, 5, 5, 5]]])
    (placement,) = place_experts(count_NME, 4, nodes=2)
    node_of = [rank // 2 for rank in placement.rank_of_expert]
    assert node_of[0] != node_of[1]
    load_r = rank_loads(count_NME[:, 0], placement)[0]
    assert load_r.reshape(2, 2).sum(1).tolist() == [50, 50]


def test_even_or_missing_loads_leave_experts_where_they_are():
    for count_NME in (np.ones((2, 2, 12)), np.zeros((2, 2, 12)), np.zeros((0, 2, 12))):
        assert place_experts(count_NME, 4) == (ExpertPlacement.contiguous(12, 4),) * 2
    assert fullest_over_mean(np.zeros((2, 2, 12)), [ExpertPlacement.contiguous(12, 4)] * 2) == 1


def test_one_hot_expert_has_a_rank_of_its_own_if_there_are_slots():
    count_NME = np.array([[[1000, 10, 10, 10, 10, 10]]])
    (placement,) = place_experts(count_NME, 2, slots=5)
    assert placement == ExpertPlacement(((0,), (1, 2, 3, 4, 5)))
    (placement,) = place_experts(count_NME, 2)
    assert placement.slots == 3


def test_impossible_sizes_are_refused():
    count_NME = np.ones((1, 1, 12))
    with pytest.raises(ValueError, match="12 experts over 4 ranks: a rank must have at least 1 and at most 2"):
        place_experts(count_NME, 4, slots=2)
    with pytest.raises(ValueError, match="12 experts over 16 ranks"):
        place_experts(count_NME, 16)
    with pytest.raises(ValueError, match="3 nodes: must divide the 4 ranks"):
        place_experts(count_NME, 4, nodes=3)


def test_the_loads_of_ranks_are_sums_over_their_experts():
    count_NE = np.array([[1, 2, 3, 4], [10, 0, 0, 0]])
    placement = ExpertPlacement(((3,), (0, 1, 2)))
    assert rank_loads(count_NE, placement).tolist() == [[4, 6], [0, 10]]
    assert fullest_over_mean(count_NE[:, None], [placement]) == (6 + 10) / (5 + 5)
