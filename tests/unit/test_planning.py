"""The search over layouts, and its words."""

import math
import re
import time
from dataclasses import replace

import pytest
from support.levels import full

from megapromoe.config.options import ConfigError
from megapromoe.config.resolve import check, resolve
from megapromoe.planning import explain
from megapromoe.planning.cost import (
    OptimizerGroup,
    optimizer_groups,
)
from megapromoe.planning.explain import experts_in_parallel, limits, reasons, settings
from megapromoe.planning.machines import GIB, MACHINES, Assumptions
from megapromoe.planning.roofline import nodes_of
from megapromoe.planning.search import ACROSS, ALIKE, CLOSE, PlanError, candidates, fold, search
from megapromoe.planning.zero import consecutive_groups

H100, ASSUME = MACHINES["h100"], Assumptions()
NETWORK = replace(ASSUME, links=1.0, near=0.0, far=0.0, peer=0.0, imbalance=1.0)


def find(preset: str, world: int, *overrides: str, machine=H100, assume=ASSUME, fixed=frozenset()):
    return search(resolve(preset, overrides=overrides), world, machine, assume, fixed)


# ---- the search


@pytest.mark.full
def test_every_layout_is_tried_once():
    """8 ranks: tp and ep of 1, 2, 4, 8; experts split or not where tp > 1; 3 stages; 4 ways to recompute."""
    tried = list(candidates(resolve("promoe_xl"), 8, H100))
    assert len(tried) == len(set(tried)) == (4 + 3 * 4 * 2) * 3 * 4
    result = find("promoe_xl", 8)
    assert len(result.fitting) + len(result.too_large) + result.impossible == len(tried)
    # With split experts ep must divide 8 / tp: no for tp, ep of 2, 8; 4, 4 and 8; 8, 2, 4 and 8.
    assert result.impossible == 6 * 3 * 4
    for plan in result.fitting:
        check(plan.config, 8)
        assert plan.layout == plan.config.layout(8) and plan.memory.peak <= result.limit


@pytest.mark.full
def test_the_limit_separates_plans_that_fit_from_others():
    result = find("promoe_xl", 8, machine=replace(H100, memory=20 * GIB))
    assert result.limit == 18 * GIB and result.fitting and result.too_large
    assert all(p.memory.peak <= result.limit for p in result.fitting)
    assert all(p.memory.peak > result.limit for p in result.too_large)


def test_fixed_settings_stay():
    result = find(
        "promoe_xl", 8, "parallel.ep=4", "train.deepspeed=bf16_zero2", fixed={"parallel.ep", "train.deepspeed"}
    )
    assert {(p.layout.ep, p.stage) for p in result.fitting} == {(4, 2)}


@pytest.mark.full
def test_four_thousand_gpus_in_seconds():
    start = time.monotonic()
    result = find("promoe_xl", 4096, "train.global_batch=4096", "model.num_experts=64")
    # tp 1, 2, 4, 8; ep 1 to 64; split or not where tp > 1; 3 stages, 2 of them also with states of a node; 4 ways to
    # recompute.
    assert len(result.fitting) + len(result.too_large) + result.impossible == (7 + 3 * 7 * 2) * (3 + 2) * 4
    assert time.monotonic() - start < 60  # takes one or two where nothing else runs


@pytest.mark.full
def test_among_equals_the_simplest_wins():
    result = find("promoe_xl", 64)
    fastest = min(p.time.total for p in result.fitting)
    assert result.best.time.total <= fastest * CLOSE
    assert result.best.complexity == min(p.complexity for p in result.fitting if p.time.total <= fastest * CLOSE)


@pytest.mark.parametrize(
    ("preset", "world", "experts", "gpu", "nodes_of_ep"),
    [full("promoe_xl", 32, 12, "h100", 1), full("promoe_xl", 256, 12, "a100", 1), full("promoe_xl", 32, 64, "h100", 2)],
)
def test_experts_are_spread_over_nodes_only_where_that_is_much_faster(preset, world, experts, gpu, nodes_of_ep):
    """The second is faster over nodes, by less than `ACROSS`; the third by twice."""
    result = find(preset, world, f"model.num_experts={experts}", machine=MACHINES[gpu])
    best = result.best
    assert best.ep_nodes == nodes_of(best.layout.ep, best.layout.etp, MACHINES[gpu]) == nodes_of_ep
    inside = min(p.time.total for p in result.fitting if p.ep_nodes == 1)
    fastest = min(p.time.total for p in result.fitting)
    assert (inside > ACROSS * fastest) == (nodes_of_ep > 1)
    words = "\n".join(reasons(result, MACHINES[gpu]))
    if nodes_of_ep > 1:
        figures = f"{1e3 * best.time.total:.1f} against {1e3 * inside:.1f} ms a step"
        assert f"ep {best.layout.ep} spans {nodes_of_ep} nodes" in words and figures in words.splitlines()[-1]
    elif inside > fastest:
        assert "it spreads experts over" in words and "25% faster" in words


@pytest.mark.full
def test_experts_are_spread_over_nodes_where_nothing_else_fits():
    """Four GPUs a node: 64 experts over four of them do not fit, over sixteen they do."""
    machine = replace(H100, gpus_per_node=4, network=1e8)
    plans = find("promoe_xl", 16, "model.num_experts=64", machine=machine).fitting
    inside, across = (min(p.memory.peak for p in plans if (p.ep_nodes > 1) == spread) for spread in (False, True))
    assert across < inside
    small = replace(machine, memory=int((inside + across) / 2 / ASSUME.usable))
    result = find("promoe_xl", 16, "model.num_experts=64", machine=small)
    assert result.best.ep_nodes > 1 and "no layout with ep inside a node fits" in "\n".join(reasons(result, small))


@pytest.mark.full
def test_a_list_has_no_near_duplicates():
    for preset, experts, world in (("promoe_xl", 12, 32), ("promoe_xl", 64, 64), ("dit_b", 1, 8)):
        result = find(preset, world, *([f"model.num_experts={experts}"] if experts > 1 else []))
        listed = fold(result.fitting)
        assert listed[0][0] is result.best and sum(count for _, count in listed) == len(result.fitting)
        assert len(listed) < len(result.fitting)
        for plan in result.fitting:  # each is like one that is listed, or is listed
            assert any(
                abs(plan.time.total / p.time.total - 1) < 2 * (ALIKE - 1) + 0.001
                and abs(plan.memory.peak / p.memory.peak - 1) < 2 * (ALIKE - 1) + 0.001
                for p, _ in listed
            )
    simple, *rest = (replace(result.best, ep_nodes=n) for n in (1, 2, 3))
    assert fold([*rest, simple]) == [(simple, 3)]


@pytest.mark.full
def test_each_reason_has_two_choices_two_times_two_memories_and_what_decides():
    for world, experts in ((8, 12), (32, 12), (64, 64)):
        result = find("promoe_xl", world, f"model.num_experts={experts}")
        for line in list(reasons(result, H100))[:4]:
            assert re.fullmatch(
                r"(\w+ )?\w+, not (\w+ )?\w+( \(with [\w ,]+\))?: [\d.]+ against [\d.]+ ms a step, [\d.]+ against"
                r" [\d.]+ GiB; (a difference below 10% is within the error of the estimates, so the simpler layout is"
                r" chosen|\d+% faster|it spreads .*)",
                line,
            ), line


@pytest.mark.full
def test_accumulation_is_raised_only_where_nothing_else_fits():
    small, batch, kept = replace(H100, memory=20 * GIB), ("train.global_batch=1024",), frozenset({"parallel.recompute"})
    assert not find("promoe_xl", 8, *batch, fixed=kept).accumulation_changed
    result = find("promoe_xl", 8, *batch, machine=small, fixed=kept)
    assert result.accumulation_changed and result.best.config.train.accumulation > 1
    assert any("which changes the results" in line for line in reasons(result, small))
    dense = find("dit_xl", 8, *batch, machine=small, fixed=kept)
    assert any("the results stay the same" in line for line in reasons(dense, small))
    with pytest.raises(PlanError, match="no layout fits"):
        find("promoe_xl", 8, *batch, machine=small, fixed=kept | {"train.accumulation"})


def test_a_batch_that_does_not_divide_names_the_nearest():
    with pytest.raises(
        PlanError, match=r"global_batch = 256: of 4096 GPUs .* multiple of 512; nearest: 512 \(--global-batch\)"
    ):
        find("promoe_xl", 4096)
    with pytest.raises(PlanError, match=r"global_batch = 100: .* multiple of 8; nearest: 96, 104"):
        find("promoe_xl", 64, "train.global_batch=100")


def test_the_sizes_offered_first_need_no_tensor_parallelism():
    """Those of tp 8 alone come after them, and say so. What is offered can run."""
    with pytest.raises(PlanError) as error:
        find("promoe_xl", 64, "train.global_batch=100")
    before, after = str(error.value).split("; or ")
    assert "64 take different images at tp 1" in before and before.endswith("nearest: 64, 128")
    assert after.startswith("8 do at tp 8, which splits each layer over 8 GPUs") and after.endswith(
        "96, 104 (--global-batch)"
    )
    for tp, sizes in ((1, (64, 128)), (8, (96, 104))):
        for size in sizes:
            check(resolve("promoe_xl", overrides=[f"train.global_batch={size}", f"parallel.tp={tp}"]), 64)
    with pytest.raises(PlanError, match="at least 64 take different images") as error:
        find("promoe_xl", 64, "train.global_batch=100", "parallel.tp=1", fixed=frozenset({"parallel.tp"}))
    assert "tp 8" not in str(error.value)


def test_a_model_that_fits_nowhere_is_refused_with_the_smallest_need_and_a_remedy():
    with pytest.raises(PlanError) as error:
        find("promoe_xl", 1, machine=replace(H100, memory=4 * GIB))
    text = str(error.value)
    assert "no layout fits 3.6 GiB of each H100" in text and "take more nodes" in text
    needed = float(text.split("needs ")[1].split(" GiB")[0])
    assert needed > 3.6


def test_a_config_that_cannot_run_is_refused_as_such():
    with pytest.raises(ConfigError, match="parallel.tp = 3"):
        find("promoe_xl", 8, "model.heads=12", "parallel.tp=3", fixed={"parallel.tp"})


def test_a_search_tries_states_of_a_node():
    """On several nodes, where gradients are reduce-scattered; and chooses them only if they are much faster."""
    config = resolve("promoe_s")
    tried = {(c.parallel.shard_ranks, c.train.deepspeed[-5:]) for c in candidates(config, 64, H100)}
    assert tried == {(0, f"zero{stage}") for stage in range(1, 4)} | {(8, "zero1"), (8, "zero2")}
    assert {c.parallel.shard_ranks for c in candidates(config, 8, H100)} == {0}
    muon = replace(config, train=replace(config.train, optimizer="muon"))
    assert {c.parallel.shard_ranks for c in candidates(muon, 64, H100)} == {0}
    slow = replace(H100, network=H100.network / 8)
    given = resolve("promoe_xl", overrides=["train.global_batch=8192", "train.deepspeed=bf16_zero1"])
    fixed = frozenset({"train.deepspeed", "parallel.tp", "parallel.ep"})
    for machine, ranks in ((H100, 0), (slow, 8)):
        best = search(given, 64, machine, ASSUME, fixed).best
        assert best.config.parallel.shard_ranks == ranks
        assert settings(best, given).get("parallel.shard_ranks") == (str(ranks) if ranks else None)


# ---- words


def test_reasons_are_given_for_the_best_plan():
    result = find("promoe_xl", 64, "model.num_experts=64")
    best = result.best
    lines = list(reasons(result, H100))
    assert lines[0].startswith(f"tp {best.layout.tp}, not tp ") and lines[1].startswith(f"ep {best.layout.ep}, not ep ")
    assert lines[2].startswith(best.config.train.deepspeed) and "limited by" in limits(best)
    (rule, alone, spread, verdict) = experts_in_parallel(result)
    assert "E*F = 147,456" in rule and "EP sends fewer bytes" in rule
    assert alone.strip().startswith("ep 1: ") and f"ep {best.layout.ep}: " in spread and "EP is faster" in verdict
    assert not list(experts_in_parallel(find("dit_b", 8)))


@pytest.mark.full
def test_expert_parallelism_pays_below_the_break_even_and_not_above():
    few = next(experts_in_parallel(find("promoe_l", 64)))
    large_batch = next(experts_in_parallel(find("promoe_l", 1, "train.global_batch=256")))
    assert few.endswith("it sends fewer bytes") and large_batch.endswith("it sends more bytes")


def test_the_verdicts_in_bytes_and_in_time_do_not_contradict_each_other():
    """Where EP sends fewer bytes but its time is about equal, neither sentence claims that EP is faster."""
    result = find("promoe_xl", 8)
    rule, *_, verdict = experts_in_parallel(result)
    assert rule.endswith("it sends fewer bytes")
    assert verdict.startswith("  EP is about as fast: it differs by ")
    plans = sorted(result.fitting, key=lambda p: p.time.total)
    fast, slow = plans[0], plans[-1]
    assert slow.time.total > CLOSE * fast.time.total
    assert "EP is faster: it saves" in explain._verdict_in_time(slow, fast, True)
    assert "although it sends more bytes" in explain._verdict_in_time(slow, fast, False)
    assert "although it sends fewer bytes" in explain._verdict_in_time(fast, slow, True)
    assert "although" not in explain._verdict_in_time(fast, slow, False)
    assert "less than the 10% that estimates can resolve" in explain._verdict_in_time(fast, fast, True)


@pytest.mark.parametrize("preset", ["promoe_xl", "digits", "dit_b"])
def test_the_settings_make_the_plan(preset):
    base = resolve(preset)
    result = search(base, 4, H100, ASSUME)
    for plan in (result.best, result.fitting[-1]):
        words = [f"{key}={value}" for key, value in settings(plan, base).items()]
        assert resolve(preset, overrides=words, world=4) == plan.config


def test_parameter_groups_hold_consecutive_tensors():
    """Up to the limit; a larger tensor is a group of its own. Each is padded to equal, even parts."""
    assert consecutive_groups([3, 3, 3, 9, 1, 1], 6) == [range(0, 2), range(2, 3), range(3, 4), range(4, 6)]
    assert consecutive_groups([100, 51], math.inf) == [range(0, 2)]
    assert consecutive_groups([9, 2], 6) == [range(0, 1), range(1, 2)]  # DeepSpeed makes an empty group before the 9
    assert consecutive_groups([], 6) == []
    assert OptimizerGroup([100, 51], 4, routed=False).shard == 38


def test_parameter_groups_are_buckets_where_gradients_are_reduce_scattered():
    """Without, only groups of experts are limited, to 178,956,971 elements, as in DeepSpeed."""
    base = ["parallel.ep=8", "train.deepspeed=bf16_zero1"]

    def groups(*overrides: str) -> dict[bool, list[int]]:
        config = resolve("promoe_xl", overrides=[*base, *overrides], world=64)
        made = optimizer_groups(config, config.layout(64))
        return {routed: [sum(g.tensors) for g in made if g.routed == routed] for routed in (False, True)}

    buckets, plain = groups(), groups("train.gradient_reduction=all_reduce")
    for routed in (False, True):
        assert sum(buckets[routed]) == sum(plain[routed])
        assert max(buckets[routed]) <= 50_000_000 < sum(plain[routed]) and len(buckets[routed]) > 3
    assert len(plain[False]) == 1 and max(plain[True]) <= 178_956_971
    assert groups("train.optimizer=muon") != groups("train.optimizer=muon", "train.gradient_reduction=reduce_scatter")
    for choice in ("train.deepspeed=bf16_zero3", "train.deepspeed=bf16_zero2_offload"):
        assert groups(choice) == plain
