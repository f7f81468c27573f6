"""How parameters are sliced over ranks: nothing lost, nothing twice, experts that do not divide."""

import pytest
import torch
from support.meshes import mesh_of
from support.trajectory import small

from megapromoe.config.expert_placement import ExpertPlacement
from megapromoe.config.resolve import resolve
from megapromoe.distributed.mesh import rank_tables
from megapromoe.distributed.parameter_layout import ParameterLayout, Split
from megapromoe.nn.parallelize import build, layouts


@pytest.mark.parametrize("experts, ep", [(4, 1), (4, 4), (12, 8), (5, 3), (8, 8)])
def test_every_expert_has_one_owner(experts, ep):
    placement = ExpertPlacement.contiguous(experts, ep)
    owned = [list(placement.owned(r)) for r in range(ep)]
    assert sum(owned, []) == list(range(experts))
    assert max(map(len, owned)) == placement.slots and max(map(len, owned)) - min(map(len, owned)) <= 1
    slots = list(placement.slot_of_expert)
    assert slots == [r * placement.slots + i for r in range(ep) for i in range(len(owned[r]))]


@pytest.mark.parametrize(
    "world, tp, ep, expert_tp", [(4, 2, 2, False), (4, 4, 2, False), (8, 2, 2, True), (8, 1, 8, False)]
)
def test_groups_partition_the_ranks(world, tp, ep, expert_tp):
    tables = rank_tables(world, tp, ep, expert_tp)
    for table in tables.values():
        assert sorted(table.flatten().tolist()) == list(range(world))
    for rank in range(world):
        mesh = mesh_of(rank, world, tp, ep, expert_tp)
        assert mesh.tp.size * mesh.dp.size == world
        assert mesh.ep.size * mesh.edp.size * mesh.etp == world
        assert set(mesh.tp.ranks) & set(mesh.dp.ranks) == {rank} == set(mesh.ep.ranks) & set(mesh.edp.ranks)
        if expert_tp:  # the slices of one expert stay in one tp group
            assert set(mesh.ep.ranks) & set(mesh.tp.ranks) == {rank}


@pytest.mark.parametrize(
    "tp, ep, expert_tp, of_states, of_experts",
    [
        (1, 1, False, 8, 8),
        (1, 4, False, 8, 2),
        (2, 2, False, 4, 4),
        (2, 4, True, 4, 1),
        (2, 8, False, 4, 1),
        (1, 16, False, 8, 1),  # experts over two nodes: each has its states alone
    ],
)
def test_states_are_divided_over_the_ranks_of_a_node(tp, ep, expert_tp, of_states, of_experts):
    """32 ranks in nodes of 8: shards are in one node, and every rank of dp or edp has a shard and a replica."""
    world, node = 32, 8
    for table in rank_tables(world, tp, ep, expert_tp, node).values():
        assert sorted(table.flatten().tolist()) == list(range(world))
    for rank in range(world):
        mesh = mesh_of(rank, world, tp, ep, expert_tp, node)
        for expert, group, size in ((False, mesh.dp, of_states), (True, mesh.edp, of_experts)):
            shard, replicas = mesh.shard_group(expert), mesh.replica_group(expert)
            assert shard.size == size and shard.size * replicas.size == group.size
            assert {other // node for other in shard.ranks} == {rank // node}
            assert set(shard.ranks) | set(replicas.ranks) <= set(group.ranks)
            assert set(shard.ranks) & set(replicas.ranks) == {rank}
        undivided = mesh_of(rank, world, tp, ep, expert_tp)
        assert undivided.shard_group(True) == undivided.edp and undivided.replica_group(False).size == 1
        assert len(mesh.directions) == 9 and len(undivided.directions) == 5


PLACED = {
    2: ExpertPlacement(((1,), (0, 2, 3, 4))),
    3: ExpertPlacement(((4,), (0, 2), (1, 3))),
    4: ExpertPlacement(((4,), (0, 1), (3,), (2,))),
}


@pytest.mark.parametrize(
    "world, tp, ep, expert_tp", [(4, 2, 2, False), (4, 2, 2, True), (8, 2, 4, False), (6, 2, 3, False)]
)
def test_slices_of_all_ranks_make_the_logical_tensor(world, tp, ep, expert_tp):
    cases = [
        ParameterLayout("qkv", (24, 8), Split(0, blocks=3)),
        ParameterLayout("proj", (8, 8), Split(1)),
        ParameterLayout("norm", (7,)),
        ParameterLayout("experts", (5, 8, 4), Split(1), expert=True),
        ParameterLayout("expert bias", (5, 4), None, expert=True),
        ParameterLayout("placed", (5, 8, 4), Split(1), expert=True, placed=PLACED[ep]),
        ParameterLayout("placed gate and up", (5, 16, 4), Split(1, blocks=2), expert=True, placed=PLACED[ep]),
        ParameterLayout("placed bias", (5, 4), None, expert=True, placed=PLACED[ep]),
    ]
    for layout in cases:
        logical = torch.arange(1.0, 1 + torch.Size(layout.shape).numel()).view(layout.shape)
        copies, weights = torch.zeros(layout.shape), torch.zeros(layout.shape)
        for rank in range(world):
            mesh = mesh_of(rank, world, tp, ep, expert_tp)
            local = layout.local_shard(logical, mesh)
            assert local.shape == layout.local_shape(mesh)
            partitions = layout.gradient_group(mesh).size
            for local_slice, logical_slice in layout.shard_slices(mesh):
                assert torch.equal(local[local_slice], logical[logical_slice])
                copies[logical_slice] += 1
                weights[logical_slice] += 1 / (layout.replica_count(mesh) * partitions)
        assert copies.min() > 0, layout.name
        # The rule of the clip norm: every logical element counts once.
        torch.testing.assert_close(weights, torch.ones(layout.shape), msg=layout.name)


def test_a_placement_is_for_one_number_of_ranks():
    layout = ParameterLayout("experts", (5, 8, 4), expert=True, placed=PLACED[2])
    with pytest.raises(ValueError, match="placement of 5 experts over 2 ranks: must be of 5 experts over 4 ranks"):
        layout.local_shape(mesh_of(0, 4, 1, 4))


def test_a_dimension_that_does_not_divide_is_named():
    layout = ParameterLayout("blocks.0.attn.qkv.weight", (18, 6), Split(0, blocks=3))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight: dimension 0 .* parallel\.tp"):
        layout.local_shape(mesh_of(0, 4, 4, 1))


@pytest.mark.parametrize("world, tp, ep, expert_tp", [(4, 2, 2, False), (8, 2, 4, True), (8, 1, 8, False)])
def test_the_model_starts_the_same_at_every_layout(world, tp, ep, expert_tp):
    config = small("model.num_experts=6" if ep == 4 else "model.num_experts=12", f"parallel.tp={tp}",
                   f"parallel.ep={ep}", f"parallel.expert_tp={str(expert_tp).lower()}")  # fmt: skip
    logical = dict(build(config).named_parameters())
    for rank in (0, world - 1):
        mesh = mesh_of(rank, world, tp, ep, expert_tp)
        model = build(config, mesh)
        for name, local in model.named_parameters():
            assert torch.equal(local, model.layouts[name].local_shard(logical[name], mesh)), name


def test_the_model_starts_the_same_with_every_placement():
    config = small("model.num_experts=5")
    logical = dict(build(config).named_parameters())
    placed = {1: PLACED[2], 3: ExpertPlacement(((0, 3, 4), (1, 2)))}
    for rank in range(2):
        mesh = mesh_of(rank, 2, 1, 2)
        model = build(config, mesh, placements=placed)
        parameters = dict(model.named_parameters())
        for name, local in parameters.items():
            assert torch.equal(local, model.layouts[name].local_shard(logical[name], mesh)), name
        for block, placement in placed.items():
            weight = parameters[f"blocks.{block}.mlp.experts.fc1.weight"]
            expected = logical[f"blocks.{block}.mlp.experts.fc1.weight"][list(placement.owned(rank))]
            assert len(weight) == placement.slots
            assert torch.equal(weight[: len(expected)], expected) and not weight[len(expected) :].any()


def test_dense_experts_of_a_layer_start_different():
    several = build(small("model.num_shared_experts=2", "model.num_unconditional_experts=2"))
    weights = dict(several.named_parameters())
    for kind in ("shared", "unconditional"):
        assert not torch.equal(*(weights[f"blocks.1.mlp.{kind}.{i}.fc1.weight"] for i in (0, 1)))
    single = dict(build(small()).named_parameters())
    for name in ("shared.fc1.weight", "unconditional.fc2.bias"):  # as in checkpoints from before there could be several
        assert f"blocks.1.mlp.{name}" in single


def test_experts_start_different_and_seeds_matter():
    first, other = (dict(build(small(f"train.seed={s}")).named_parameters()) for s in (0, 1))
    weight = first["blocks.1.mlp.experts.fc1.weight"]
    assert not torch.equal(weight[0], weight[1])
    assert not torch.equal(weight, other["blocks.1.mlp.experts.fc1.weight"])
    zeros = {n for n, p in first.items() if not p.any()}
    assert zeros == {n for n in first if n.endswith("bias") or "adaLN" in n or n.startswith("final_layer.linear")}


@pytest.mark.parametrize(
    "router, low, high, spread",
    [
        ("tc", 0.98 / 16, 1 / 16, 1 / 16 / 3**0.5),  # Kaiming-uniform, a = √5: within ±1/√D of D = 256
        ("ec", 0.006 * 2.5, 0.006 * 5, 0.006),
        ("diffmoe", 0.006 * 2.5, 0.006 * 5, 0.006),
        ("promoe_linear", 0.9 * (6 / 272) ** 0.5, (6 / 272) ** 0.5, (2 / 272) ** 0.5),  # Xavier
    ],
)
def test_gates_start_as_published(router, low, high, spread):
    config = small(f"model.router={router}", "model.hidden_size=256", "model.num_experts=16", "model.depth=2")
    model = build(config).requires_grad_(False)
    gate = dict(model.named_parameters())["blocks.1.mlp.router.gate"]
    assert low < gate.abs().max() <= high
    assert float(gate.std()) == pytest.approx(spread, rel=0.03) and abs(gate.mean()) < 0.05 * spread
    # The other matrices of the layer are as they were: Xavier-uniform.
    fc1 = dict(model.named_parameters())["blocks.1.mlp.experts.fc1.weight"]
    assert float(fc1.abs().max()) == pytest.approx((6 / (256 + 512)) ** 0.5, rel=0.01)


# (router, parameter or buffer): its first and its last number. They must never change: a run is repeated by its seed.
INITIAL = {
    ("promoe", "x_embedder.proj.weight"): (-0.1021533, -0.0381418),
    ("promoe", "t_embedder.mlp.2.weight"): (-0.0204741, 0.0121642),
    ("promoe", "y_embedder.embedding_table.weight"): (-0.0179142, -0.0192782),
    ("promoe", "blocks.0.attn.qkv.weight"): (0.0685244, -0.1988697),
    ("promoe", "blocks.0.mlp.fc2.weight"): (-0.1899816, -0.1129346),
    ("promoe", "blocks.1.mlp.router.prototypes"): (-0.0001015, 0.0088777),
    ("promoe", "blocks.1.mlp.experts.fc1.weight"): (-0.0985426, 0.0333202),
    ("promoe", "blocks.1.mlp.experts.fc2.weight"): (0.1685568, 0.1488421),
    ("promoe", "blocks.1.mlp.shared.fc1.weight"): (-0.1351385, 0.1448941),
    ("promoe", "blocks.3.mlp.unconditional.fc2.weight"): (-0.0931732, 0.0188218),
    ("promoe_linear", "blocks.1.mlp.router.gate"): (0.3846493, -0.2402184),
    ("tc", "blocks.1.mlp.router.gate"): (0.1665580, -0.1040176),
    ("ec", "blocks.1.mlp.router.gate"): (-0.0157436, 0.0163655),
    ("diffmoe", "blocks.1.mlp.router.gate"): (-0.0157436, 0.0163655),
    ("diffmoe", "blocks.1.mlp.router.predictor.2.weight"): (-0.0688349, -0.1541702),
    ("classification", "blocks.1.mlp.router.classifier.weight"): (0.2297939, -0.2479141),
    ("kmeans", "blocks.1.mlp.router.centroids"): (-0.0261123, -0.1361792),
    ("gmm", "blocks.1.mlp.router.means"): (0.0080448, -0.0479604),
    ("race", "blocks.1.mlp.router.projection"): (0.1514720, -0.2774386),
    ("race", "blocks.1.mlp.router.gate"): (0.3846493, -0.2402184),
    ("conditional", "blocks.1.mlp.conditional.fc1.weight"): (-0.2336029, 0.1213151),
}


@pytest.mark.parametrize("router", dict.fromkeys(router for router, _ in INITIAL))
def test_initial_values_are_those_of_the_first_version(router):
    state = build(small(f"model.router={router}")).state_dict()
    for (of_router, name), (first, last) in INITIAL.items():
        if of_router == router:
            values = state[name].flatten()
            assert [float(values[0]), float(values[-1])] == pytest.approx([first, last], abs=1e-7), name


def test_every_published_size_has_a_layout_on_eight_ranks():
    with torch.device("meta"):
        from megapromoe.nn.dit import DiT

        for preset in ("promoe_s", "promoe_b", "promoe_l", "promoe_xl", "tc_l_e8", "diffmoe_xl_e8", "dit_xl"):
            config = resolve(preset, overrides=("parallel.tp=2",))
            for layout in layouts(DiT(config.model)).values():
                layout.local_shape(mesh_of(0, 8, 2, 1 if preset == "dit_xl" else 8))
