"""The search over layouts, its words, and `megapromoe plan`."""

import json
import math
import re
import shlex
import time
from dataclasses import replace

import pytest
from support.levels import full

from megapromoe.cli import main
from megapromoe.config.options import ConfigError
from megapromoe.config.resolve import check, resolve
from megapromoe.distributed.mesh import rank_tables
from megapromoe.planning import explain
from megapromoe.planning.cost import (
    OptimizerGroup,
    flops_per_image,
    memory_per_rank,
    optimizer_groups,
    tensors_on_rank,
)
from megapromoe.planning.explain import experts_in_parallel, limits, reasons, settings
from megapromoe.planning.machines import GIB, MACHINES, Assumptions
from megapromoe.planning.roofline import EXPERT_KERNELS, GROUPED_KERNELS, collective_time, nodes_of, step_time
from megapromoe.planning.search import ACROSS, ALIKE, CLOSE, PlanError, candidates, fold, search
from megapromoe.planning.traffic import Collective, collectives, expected_batch, routed_rows
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


# ---- time


def test_the_nodes_of_every_group_agree_with_the_rank_tables():
    """Nodes and neighbours of every group, against the mesh's own tables."""
    for tp, ep, split in ((1, 8, False), (2, 4, False), (2, 4, True), (8, 16, False), (4, 2, True)):
        tables = rank_tables(64, tp, ep, split)
        etp = tp if split else 1
        for over, stride in (("tp", 1), ("dp", tp), ("ep", etp), ("edp", ep * etp)):
            for row in tables[over]:
                assert nodes_of(len(row), stride, H100) == len({int(r) // 8 for r in row}), (over, tp, ep, split)


def test_shards_of_a_node_are_gathered_inside_and_summed_between_nodes():
    """64 ranks in nodes of 8: bytes by the links that carry them, memory, and a step that overlaps more."""
    base = ["parallel.ep=4", "train.deepspeed=bf16_zero1", "train.global_batch=4096", "parallel.recompute=all"]
    configs = [resolve("promoe_xl", overrides=[*base, f"parallel.shard_ranks={n}"], world=64) for n in (0, 8)]
    layout = configs[1].layout(64)
    assert (layout.dp_shard, layout.edp_shard) == (8, 2)
    calls = [c for c in collectives(configs[1], layout) if c.over.startswith(("dp", "edp")) and c.phase != "forward"]
    calls = [c for c in calls if c.phase != "backward"]
    assert {(c.op, c.over, c.size) for c in calls} == {
        ("reduce_scatter", "dp_shard", 8),
        ("all_gather", "dp_shard", 8),
        ("all_reduce", "dp_replicas", 8),
        ("reduce_scatter", "edp_shard", 2),
        ("all_gather", "edp_shard", 2),
        ("all_reduce", "edp_replicas", 8),
    }
    for c in calls:
        inside = Collective("x", c.op, "tp", c.size, c.count, c.payload, c.phase)  # consecutive ranks of a node
        between = c.count * 2 * c.payload * 7 / 8 / H100.network  # each GPU by its own link
        seconds = [collective_time(call, configs[1], layout, H100, NETWORK) for call in (c, inside)]
        assert seconds[0] == pytest.approx(between if c.over.endswith("replicas") else seconds[1])
    undivided, divided = (step_time(config, config.layout(64), H100, ASSUME) for config in configs)
    assert divided.overlapped > undivided.overlapped and divided.update < undivided.update
    assert divided.total < undivided.total
    memory = [memory_per_rank(config, 64) for config in configs]
    replicated, routed = (sum(tensors) for tensors in tensors_on_rank(configs[0].model, layout))
    for kind, width in (("optimizer", 12), ("ema", 4), ("gradients", 2)):
        more = getattr(memory[1], kind) - getattr(memory[0], kind)
        assert more == pytest.approx(width * (replicated * (1 / 8 - 1 / 64) + routed * (1 / 2 - 1 / 16)), rel=1e-4)


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


def test_collectives_take_the_time_of_their_slowest_link():
    config = resolve("promoe_xl", overrides=["parallel.ep=8"], world=64)
    layout = config.layout(64)

    def seconds(op, over, size):
        c = Collective("x", op, over, size, 1, 1e9, "forward")
        return collective_time(c, config, layout, H100, NETWORK)

    assert seconds("all_reduce", "tp", 8) == pytest.approx(2 * 7 / 8 * 1e9 / 450e9)
    # 8 nodes: each GPU's network carries an eighth of a ring's bytes.
    assert seconds("all_gather", "dp", 64) == pytest.approx(max(7 / 8 / 450, 7 / 8 / (8 * 50)))
    placed = -(-12 // 8) * 8 / 12  # the fullest rank has two of 12 experts
    assert seconds("all_to_all", "ep", 8) == pytest.approx(7 / 8 / 450 * placed)
    assert seconds("all_reduce", "edp", 8) == pytest.approx(2 * 7 / 8 / 50)  # one rank a node


def test_a_step_takes_at_least_its_operations():
    config = resolve("dit_xl", overrides=["train.global_batch=512"])
    perfect = replace(ASSUME, products=1.0, attention=1.0, memory=1e6, launch=0.0, links=1e6)
    layout = config.layout(8)
    t = step_time(config, layout, H100, perfect)
    useful = flops_per_image(config.model).training * 64 / H100.peak
    # Attention's scores are made again in the backward pass: more than useful, by little.
    assert useful < t.products + t.attention < 1.05 * useful
    assert t.total == pytest.approx(t.compute + t.exposed + t.update)


def test_time_follows_the_machine():
    config = resolve("promoe_xl")
    layout = config.layout(8)
    a100, h100, b200 = (step_time(config, layout, MACHINES[name], ASSUME).total for name in ("a100", "h100", "b200"))
    assert a100 > h100 > b200
    recomputing = replace(config, parallel=replace(config.parallel, recompute="blocks"))
    assert step_time(recomputing, layout, H100, ASSUME).products > step_time(config, layout, H100, ASSUME).products
    fp32 = replace(config, train=replace(config.train, deepspeed="fp32_zero1"))
    assert step_time(fp32, layout, H100, ASSUME).products > 5 * step_time(config, layout, H100, ASSUME).products


def test_experts_without_a_grouped_product_are_launched_one_by_one():
    """And that is what `test_counts` counts. In fp32 no GPU has one."""
    loops = replace(H100, grouped=False)
    for file, more in (("bf16_zero1", EXPERT_KERNELS * 3 - GROUPED_KERNELS), ("fp32_zero1", 0)):
        config = resolve("promoe_l", overrides=["parallel.ep=4", f"train.deepspeed={file}"])
        times = [step_time(config, config.layout(8), machine, ASSUME).host for machine in (H100, loops)]
        layers = len(config.model.moe_blocks) * config.train.accumulation
        assert times[1] - times[0] == pytest.approx(layers * more * ASSUME.launch)


def test_dispatch_sends_the_lower_bound():
    """Bytes of rows: 2 directions, forward and backward, K rows a token, D numbers each, but for those that stay."""
    config = resolve("promoe_l", overrides=["parallel.ep=4", "model.top_k=2"], world=8)
    layout = config.layout(8)
    rows = routed_rows(config.model, expected_batch(config, layout))
    assert rows == pytest.approx(32 * 0.9 * 256 * 2)
    sent = sum(c.wire for c in collectives(config, layout) if c.what.startswith(("dispatch: rows", "combine: rows")))
    assert sent == pytest.approx(12 * 4 * rows * 1024 * 2 * 3 / 4)


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


# ---- the command


def planned(capsys, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `megapromoe plan`."""
    code = main(["plan", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_ends_with_a_line_to_paste(capsys):
    code, out, err = planned(capsys, "--preset", "promoe_xl", "--experts", "64", "--nodes", "8", "--top", "3")
    assert (code, err) == (0, "")
    words = shlex.split(out.strip().splitlines()[-1])
    assert words[:4] == ["sbatch", "--nodes=8", "launchers/promoe_xl.sh", "model.num_experts=64"]
    config = resolve("promoe_xl", overrides=words[3:], world=64)
    assert config.model.num_experts == 64 and config.layout(64).world == 64
    assert "times are estimates, not measurements" in out and "all_to_all" in out and "GPU-hours" in out
    assert sum(line.lstrip()[:2] in ("1 ", "2 ", "3 ", "4 ") for line in out.splitlines()) == 3


def test_the_command_of_other_presets_is_complete(capsys):
    code, out, _ = planned(capsys, "--preset", "dit_b", "--gpus-per-node", "4", "--global-batch", "64", "train.lr=3e-4")
    words = shlex.split(out.strip().splitlines()[-1])
    assert code == 0 and words[0] == "srun" and "--ntasks-per-node=4" in words and "--resv-ports=1" not in words
    overrides = [w for w in words if "=" in w and not w.startswith("--")]
    config = resolve("dit_b", overrides=overrides, world=4)
    assert config.train.global_batch == 64 and config.train.lr == 3e-4


@pytest.mark.full
def test_json_and_plot(capsys, tmp_path):
    files = tmp_path / "plans.json", tmp_path / "memory.png"
    code, _, _ = planned(capsys, "--preset", "promoe_b", "--report", str(files[0]), "--plot", str(files[1]))
    content = json.loads(files[0].read_text())
    assert code == 0 and content["estimates"] is True and files[1].read_bytes().startswith(b"\x89PNG")
    first = content["layouts"][0]
    lines = sum(v for k, v in first["memory_bytes"].items() if k not in ("update", "host", "peak"))
    assert first["fits"] and first["memory_bytes"]["peak"] == pytest.approx(lines)
    assert first["hours"] == pytest.approx(first["step_seconds"] * 500_000 / 3600)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["memory.png", "plans.json"]


@pytest.mark.full
def test_values_of_the_machine_can_be_given(capsys):
    _, usual, _ = planned(capsys, "--preset", "promoe_xl")
    options = ("--memory-gib", "40", "--tflops", "500", "--network-gbs", "12.5", "--imbalance", "2", "--usable", "0.5")
    _, changed, _ = planned(capsys, "--preset", "promoe_xl", *options)
    assert "fit 71.1 GiB each" in usual and "fit 20.0 GiB each" in changed
    assert "H100 80GB SXM, changed: 500 TFLOP/s" in changed and "2.00 times the mean" in changed


@pytest.mark.parametrize(
    "words, message",
    [
        full(("--preset", "promoe_xl", "--memory-gib", "2", "--gpus-per-node", "2"), "no layout fits 1.8 GiB"),
        (("--preset", "promoe_xl", "--nodes", "512"), "multiple of 512"),
        (("--usable", "1.5"), "must be at most 1"),
        (("--imbalance", "0.5"), "must be at least 1"),
        (("--plot", "memory.bmp"), "must end in .png"),
        (("--report", "/nowhere/plans.json"), "/nowhere"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(capsys, words, message):
    code, out, err = planned(capsys, *words)
    assert code == 1 and not out and err.startswith("megapromoe: ") and message in err


def test_numbers_must_be_numbers(capsys):
    for words in (("--memory-gib", "-1"), ("--tflops", "nan"), ("--nodes", "0")):
        with pytest.raises(SystemExit):
            planned(capsys, *words)
