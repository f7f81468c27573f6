"""Files of placements: read back, and every mistake named with the block, the expert and the rule."""

import json
from dataclasses import replace

import pytest
from support.placements import placement_file, uneven_placement, with_replicas
from support.trajectory import small

from megapromoe.config.deepspeed_file import load_deepspeed
from megapromoe.config.expert_placement import ExpertPlacement, ReplicatedExpert, placement_text, read_placements
from megapromoe.config.options import ConfigError
from megapromoe.planning.memory import placement_in_words, replica_bytes

PLACED = {1: ExpertPlacement(((3,), (0, 1, 2))), 3: ExpertPlacement(((0, 2), (1, 3)))}
TWO = "model.num_experts=4", "parallel.ep=2"


def test_a_placement_has_a_slot_for_each_expert():
    for seed in range(20):
        placement = uneven_placement(12, 5, seed)
        assert sorted(placement.slot_of_expert) == sorted(set(placement.slot_of_expert))
        for rank in range(5):
            for index, expert in enumerate(placement.owned(rank)):
                assert placement.slot_of_expert[expert] == rank * placement.slots + index
                assert placement.rank_of_expert[expert] == rank
        assert placement.slots == max(map(len, placement.experts_of_rank)) and placement.experts == 12


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_a_file_is_read_back(tmp_path, form):
    file = tmp_path / f"placement.{form}"
    if form == "yaml":
        file.write_text(placement_text(PLACED, ["made by hand: see above"]))
    else:
        lists = {block: placement.experts_of_rank for block, placement in PLACED.items()}
        file.write_text(json.dumps({"blocks": lists}))
    assert read_placements(file, (1, 3), 4, 2) == (PLACED, [])
    config = small(*TWO, f"parallel.placement={file}")
    assert config.placements_in_file() == PLACED
    assert config.layout(2).placed_slots == (3, 2)
    assert config.layout(2).expert_slots(config.model) == (3, 2) and small(*TWO).layout(2).placed_slots == ()


COPIED = {
    1: replace(
        PLACED[1], replicas=(ReplicatedExpert(0, ((0, 0.4), (1, 0.6))), ReplicatedExpert(3, ((0, 0.75), (1, 0.25))))
    ),
    3: PLACED[3],
}


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_copies_are_read_back(tmp_path, form):
    file = tmp_path / f"placement.{form}"
    if form == "yaml":
        file.write_text(placement_text(COPIED))
        assert file.read_text().splitlines()[-2:] == ["replicas:", "  1: {0: {0: 0.4, 1: 0.6}, 3: {0: 0.75, 1: 0.25}}"]
    else:
        lists = {block: placement.experts_of_rank for block, placement in COPIED.items()}
        shares = {expert: dict(shares) for expert, shares in COPIED[1].replicas}
        file.write_text(json.dumps({"blocks": lists, "replicas": {1: shares}}))
    assert read_placements(file, (1, 3), 4, 2) == (COPIED, [])
    layout = small(*TWO, f"parallel.placement={file}").layout(2)
    assert layout.placed_slots == (3, 2) and layout.replicas == ((1, 2), (0, 0))
    assert layout.dispatch_slots(small(*TWO).model) == (4, 2) and small(*TWO).layout(2).replicas == ()


def test_copies_have_the_slots_after_those_of_a_ranks_experts():
    for seed in range(20):
        placement = with_replicas(uneven_placement(12, 4, seed), seed)
        width, rows_E = placement.dispatch_slots, [0.0] * 12
        assert width == placement.slots + placement.replica_slots
        hosts = {slot: (expert, share) for expert in range(12) for slot, share in placement.hosts_of(expert)}
        for rank in range(4):
            slots = placement.shares_of_rank(rank)
            assert [expert for slot, (expert, _) in slots.items() if slot < placement.slots] == [*placement.owned(rank)]
            copies = [expert for slot, (expert, _) in slots.items() if slot >= placement.slots]
            assert tuple(copies) == placement.copies_of_rank[rank] and not {*copies} & {*placement.owned(rank)}
            for slot, (expert, share) in slots.items():
                assert hosts.pop(rank * width + slot) == (expert, share)
                rows_E[expert] += share
        assert not hosts and rows_E == pytest.approx([1] * 12)


def test_the_order_within_a_rank_does_not_matter(tmp_path):
    file = tmp_path / "placement.yaml"
    file.write_text("blocks: {1: [[3], [2, 0, 1]], 3: [[2, 0], [3, 1]]}")
    assert read_placements(file, (1, 3), 4, 2)[0] == PLACED


def test_a_changed_file_is_read_again(tmp_path):
    file = tmp_path / "placement.yaml"
    for first in (PLACED[1], PLACED[3]):
        file.write_text(placement_text(PLACED | {1: first}))
        assert read_placements(file, (1, 3), 4, 2)[0][1] == first


BOTH = "blocks: {1: [[0, 1], [2, 3]], 3: [[0, 1], [2, 3]]}\n"
MISTAKES = {
    "{}": ["the file must have the key blocks"],
    "[1]": ["the file must have the key blocks"],
    "blocks: [": ["the file is not YAML"],
    "blocks: {1: [[0, 1], [2, 3]], 1: [[0, 1], [2, 3]]}": ["occurs twice"],
    "blocks: {1: [[0, 1], [2, 3]]}": ["block 3 is missing; list the experts of each rank for every block with experts"],
    "{blocks: {1: [[0, 1], [2, 3]], 3: [[0, 1], [2, 3]], 2: []}, ep: 2}": [
        "'ep' is not a key of the file; known: blocks",
        "block 2: has no routed experts; those with experts are 1, 3",
    ],
    "blocks: {1: [[0, 1], [2, 2]], 3: [[0, 1], [1, 2, 3]]}": [
        "block 1: expert 2 is listed on ranks 1, 1; list each expert once",
        "block 1: expert 3 on no rank; list each expert once",
        "block 3: expert 1 is listed on ranks 0, 1; list each expert once",
    ],
    "blocks: {1: [[0, 1, 2, 3], []], 3: [[0, 1, 2, 3]]}": [
        "block 1: rank 1 has no expert; give each rank at least one",
        "block 3: lists 1 ranks; must list 2, one for each of parallel.ep = 2",
    ],
    "blocks: {1: [[0, 1], [2, 4]], 3: [[0, true], [2, x]]}": [
        "block 1: rank 1: expert 4 does not exist; experts are 0..3",
        "block 3: rank 0: expert True does not exist",
        "block 3: rank 1: expert 'x' does not exist",
        "block 3: experts 1, 3 on no rank",
    ],
    BOTH + "replicas: [1]": ["replicas must be a mapping"],
    BOTH + "replicas: {2: {}, 3: 7}": [
        "block 2: has no routed experts; those with experts are 1, 3",
    ],
    BOTH + "replicas: {1: 7, 3: {4: {}, 0: 5, 1: {0: 1}, 2: {0: 1, 2: 0}}}": [
        "block 1: replicas: must be a mapping from an expert to the share of its rows on each rank",
        "block 3: replicas: expert 4 does not exist; experts are 0..3",
        "block 3: replicas: expert 0: must be a mapping from ranks to shares",
        "block 3: replicas: expert 1: must list its owner, rank 0, and at least one other rank",
        "block 3: replicas: expert 2: rank 2 does not exist; ranks are 0..1",
    ],
    BOTH + "replicas: {1: {0: {0: 2, 1: 0}, 2: {0: 0.5, 1: 0.3}}}": [
        "block 1: replicas: expert 0: share 2 must be a number from 0 to 1",
        "block 1: replicas: expert 2: its shares add up to 0.8; they must add up to 1",
    ],
    "blocks: {1: [0, 1, 2, 3], 3: 7}": [
        "block 1: must be a list of the experts of each rank, such as [[0, 2], [1, 3]], not [0, 1, 2, 3]",
        "block 3: must be a list of the experts of each rank",
    ],
}


@pytest.mark.parametrize("text", MISTAKES)
def test_all_mistakes_of_a_file_are_named_at_once(tmp_path, text):
    file = tmp_path / "placement.yaml"
    file.write_text(text)
    config = small(*TWO, f"parallel.placement={file}")
    with pytest.raises(ConfigError) as refused:
        config.layout(2)
    for mistake in MISTAKES[text]:
        assert f"parallel.placement = {str(file)!r}: " in str(refused.value) and mistake in str(refused.value)


def test_a_missing_file_is_named_where_ranks_are(tmp_path):
    """Commands that use no ranks of the run, such as sampling, do not need the file."""
    config = small(*TWO, f"parallel.placement={tmp_path / 'none.yaml'}")
    with pytest.raises(ConfigError, match=r"parallel.placement = .*none.yaml': the file cannot be read \(No such file"):
        config.layout(2)


def test_what_is_no_placement_is_refused():
    with pytest.raises(
        ConfigError, match="parallel.placement = 'automatic': must be one of contiguous, auto, FILE.yaml"
    ):
        small("parallel.placement=automatic")
    with pytest.raises(ConfigError, match="must be contiguous for a model without routed experts"):
        small("model.router=dense", "parallel.placement=x.yaml").layout(1)


def test_copies_need_a_load_and_what_they_can_run_with(tmp_path):
    with pytest.raises(ConfigError, match="parallel.replicas = 2: must be 0 with parallel.placement = 'contiguous'"):
        small(*TWO, "parallel.replicas=2")
    with pytest.raises(ConfigError, match="parallel.replicas = 'auto': must be 0 .*a file lists its copies itself"):
        small(*TWO, "parallel.replicas=auto", "parallel.placement=x.yaml")
    for value in ("-1", "some", "1.5", "true"):
        with pytest.raises(ConfigError, match="parallel.replicas = .*must (be a whole number, or auto|lie in)"):
            small(*TWO, f"parallel.replicas={value}", "parallel.placement=auto")
    file = tmp_path / "copies.yaml"
    file.write_text(placement_text(COPIED))
    for options in ((f"parallel.placement={file}",), ("parallel.placement=auto", "parallel.replicas=1")):
        assert small(*TWO, *options).may_have_replicas and not small(*options).may_have_replicas, "without ep"
        with pytest.raises(ConfigError, match=r"model.capacity_factor = 1.5: must be 0 with copies of experts \("):
            small(*TWO, *options, "model.capacity_factor=1.5").layout(2)
        with pytest.raises(ConfigError, match="train.compile = True: must be false with copies of experts"):
            small(*TWO, *options, "train.compile=true").layout(2)
        with pytest.raises(ConfigError, match="train.deepspeed = 'fp32_zero3': must not be ZeRO stage 3 with copies"):
            load_deepspeed(small(*TWO, *options, "train.deepspeed=fp32_zero3"))


def test_a_number_of_copies_is_planned_on_every_rank():
    config = small(*TWO, "parallel.placement=auto", "parallel.replicas=1")
    assert config.layout(2).replicas == ((1, 2), (1, 2))
    hundred = replace(config, parallel=replace(config.parallel, replicas=100))
    assert hundred.layout(2).replicas == ((2, 4), (2, 4)), "all experts of the other rank"
    assert small(*TWO, "parallel.placement=auto", "parallel.replicas=auto").layout(2).replicas == ()


def test_the_price_of_copies_is_stated(tmp_path):
    file = tmp_path / "copies.yaml"
    file.write_text(placement_text(COPIED))
    expert = (2 * 32 * 64 + 32 + 64) * 4 / 1e6  # MB
    # One copy is kept; its gradient, the message with it, and the one that an owner gets.
    words = placement_in_words(small(*TWO, f"parallel.placement={file}"), 2)
    assert words.endswith(f"; up to 1 copies of experts of other ranks in a block, up to {4 * expert:.1f} MB in a step")
    recomputed = small(*TWO, f"parallel.placement={file}", "parallel.recompute=moe")
    assert replica_bytes(recomputed, recomputed.layout(2)) == (0, 4 * expert * 1e6)


def test_the_price_of_uneven_numbers_is_stated(tmp_path):
    file = placement_file(tmp_path, 12, 2, seed=1)
    what = "model.num_experts=12", "parallel.ep=2", f"parallel.placement={file}"
    low, high = sorted(small(*what).layout(2).placed_slots)
    expert = 2 * 32 * 64 + 32 + 64  # parameters
    more = (low + high - 12) * expert * 4 * (1 + 1 + 3 + 1) / 1e6  # fp32: parameters, gradients, AdamW and masters, EMA
    assert placement_in_words(small(*what), 2) == (
        f"{file}: a rank stores {low} to {high} experts of a block instead of 6: {more:.1f} MB more states on each rank"
    )
    assert placement_in_words(small(*what[:2]), 2) is None
