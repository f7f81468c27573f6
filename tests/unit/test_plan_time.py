"""The estimated time of a step: operations, links, memory and launches."""

from dataclasses import replace

import pytest

from megapromoe.config.resolve import resolve
from megapromoe.distributed.mesh import rank_tables
from megapromoe.planning.cost import (
    flops_per_image,
    memory_per_rank,
    tensors_on_rank,
)
from megapromoe.planning.machines import MACHINES, Assumptions
from megapromoe.planning.roofline import EXPERT_KERNELS, GROUPED_KERNELS, collective_time, nodes_of, step_time
from megapromoe.planning.traffic import Collective, collectives, expected_batch, routed_rows

H100, ASSUME = MACHINES["h100"], Assumptions()
NETWORK = replace(ASSUME, links=1.0, near=0.0, far=0.0, peer=0.0, imbalance=1.0)


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
