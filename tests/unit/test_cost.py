"""Parameter, FLOP and memory formulas against published figures, the built model and torch's own counter."""

import re
from dataclasses import replace

import pytest
import torch
from support.placements import placement_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megapromoe.config.model_options import ModelConfig
from megapromoe.config.resolve import resolve
from megapromoe.distributed.mesh import Group, Mesh
from megapromoe.nn.dit import DiT
from megapromoe.nn.parallelize import build, initial_values, layouts
from megapromoe.nn.text_condition import TextCondition
from megapromoe.planning.cost import flops_per_image, memory_per_rank, parameters

SMALL = ModelConfig(hidden_size=32, depth=4, heads=4, input_size=8, num_classes=10, num_experts=6, expert_ratio=1.5)
ALL_OPTIONS = {
    "activation": "swiglu",
    "norm": "rms",
    "qk_norm": "rms",
    "positions": "rope",
    "modulation": "shared",
}
TEXT = {"condition": "text", "num_classes": 1000, "text_width": 12, "text_tokens": 6}


@pytest.mark.parametrize("experts, millions", [(4, 659.6), (8, 861.2), (16, 1264), (32, 2070), (64, 3682), (128, 6907)])
def test_published_sweep_over_experts(experts, millions):
    model = resolve("promoe_l", overrides=[f"model.num_experts={experts}"]).model
    assert parameters(model).total / 1e6 == pytest.approx(millions, abs=0.5 if experts > 8 else 0.05)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"router": "dense", "qk_norm": "layer"},
        {"router": "conditional"},
        {"router": "conditional", "activation": "swiglu", "shared_expert": False, "num_unconditional_experts": 2},
        {"router": "promoe_ec", "shared_expert": False, "moe_every": 1},
        {"router": "tc", "unconditional_expert": False, "learn_sigma": False},
        {"router": "classification", "shared_expert": False},
        {"router": "kmeans", "unconditional_expert": False},
        {"router": "promoe_linear"},
        {"router": "gmm"},
        {"router": "race", "qk_norm": "layer"},
        {"router": "gmm", "mixture_variance": "isotropic"},
        {"router": "ec", "top_k": 2},
        {"router": "diffmoe", "qk_norm": "layer", "mlp_ratio": 3.0},
        {"num_shared_experts": 3, "shared_expert_width": 20, "num_unconditional_experts": 2},
        {"expert_width": 13, "num_shared_experts": 2, "unconditional_expert": False},
        {"router": "kmeans", "num_unconditional_experts": 4, "shared_expert": False, "expert_width": 31},
        {"activation": "swiglu", "num_shared_experts": 2, "shared_expert_width": 20, "expert_width": 13},
        {"router": "dense", "activation": "swiglu", "mlp_ratio": 2.5},
        {"norm": "rms", "qk_norm": "rms"},
        {"positions": "rope"},
        {"modulation": "shared", "qk_norm": "layer"},
        ALL_OPTIONS,
        TEXT,
        {**TEXT, **ALL_OPTIONS, "text_ffn": 40, "moe_every": 1},
        {**TEXT, "router": "dense", "depth": 1, "text_ffn": 40},
    ],
)
def test_parameters_of_the_built_model(change):
    model = replace(SMALL, **change)
    with torch.device("meta"):
        built = sum(p.numel() for p in DiT(model).parameters())
    counted = parameters(model)
    assert counted.trainable == built
    positions = 0 if model.positions == "rope" else (model.tokens + model.text_tokens) * model.hidden_size
    assert counted.total == built + positions == sum(counted.by_part.values())


def test_active_follows_top_k():
    small = parameters(SMALL)
    two = parameters(replace(SMALL, top_k=2))
    per_expert = small.by_part["routed experts"] // SMALL.num_experts
    assert two.active - small.active == per_expert
    assert small.total - small.active == 5 * per_expert + small.by_part["unconditional expert"]


@pytest.mark.parametrize("preset, giga_macs", [("dit_b", 23.01), ("dit_l", 80.71), ("dit_xl", 118.64)])
def test_published_operations_of_dit(preset, giga_macs):
    """DiT's paper counts multiply-adds, and rounds."""
    forward = flops_per_image(resolve(preset).model).forward
    assert forward / 2e9 == pytest.approx(giga_macs, rel=5e-4)


def test_operations_of_promoe_are_those_of_dit():
    """Two half-width experts do a dense MLP's work; the router adds its scores."""
    sparse, dense = (flops_per_image(resolve(name).model) for name in ("promoe_l", "dit_l"))
    assert sparse.forward - sparse.by_part["router"] == dense.forward
    assert sparse.training == 3 * sparse.forward == 3 * sum(sparse.by_part.values())


@pytest.mark.parametrize("router", ["dense", "conditional"])
@pytest.mark.parametrize("change", [{}, {"qk_norm": "layer", "learn_sigma": False, "mlp_ratio": 3.0}, ALL_OPTIONS])
def test_operations_that_torch_counts(change, router):
    config = resolve("digits", overrides=[f"model.router={router}"])
    config = replace(config, model=replace(config.model, **change))
    model, side = build(config), config.model.input_size
    counter = FlopCounterMode(display=False)
    images = 3
    x = torch.zeros(images, config.model.in_channels, side, side)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(x, torch.zeros(images), torch.zeros(images, dtype=torch.int64), images)
    assert counter.get_total_flops() == images * flops_per_image(config.model).forward


@pytest.mark.parametrize("change", [{}, {**ALL_OPTIONS, "text_ffn": 40}])
def test_operations_of_texts_that_torch_counts(change):
    config = resolve("promoe_s", overrides=["model.router=dense", "model.depth=3", "model.input_size=8"])
    config = replace(config, model=replace(config.model, **TEXT, **change))
    model = build(config)
    counter = FlopCounterMode(display=False)
    images, m = 3, config.model
    texts = TextCondition(torch.zeros(images, m.text_tokens, m.text_width), torch.ones(images, m.text_tokens).bool())
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.zeros(images, 4, 8, 8), torch.zeros(images), texts, images)
    assert counter.get_total_flops() == images * flops_per_image(m).forward


def products_of_experts(config):
    """Operations that torch counts in the shared and unconditional experts for one labelled image."""
    model = build(config).eval()
    counter = FlopCounterMode(display=False)
    m = config.model
    x = torch.zeros(1, m.in_channels, m.input_size, m.input_size)
    with torch.no_grad(), counter:
        model(x, torch.zeros(1), torch.zeros(1, dtype=torch.int64), 1)
    counts = counter.get_flop_counts()
    return sum(
        sum(table.values())
        for name, table in counts.items()
        if re.fullmatch(r"DiT\.blocks\.\d+\.mlp\.(shared|uncon).*fc.", name)
    )


def test_operations_of_several_shared_experts_that_torch_counts():
    settings = ["model.num_shared_experts=3", "model.shared_expert_width=20", "model.num_unconditional_experts=2"]
    config = resolve("digits", overrides=settings)
    counted = flops_per_image(config.model).by_part
    assert "unconditional expert" not in counted
    assert products_of_experts(config) == counted["shared expert"] == 2 * 3 * 2 * 2 * 64 * 20 * 16


def test_active_parameters_have_all_shared_and_no_unconditional_expert():
    small = parameters(SMALL)
    several = parameters(replace(SMALL, num_shared_experts=3, num_unconditional_experts=2))
    per_expert = small.by_part["shared expert"]
    assert several.active - small.active == 2 * per_expert
    assert several.total - small.total == 3 * per_expert


@pytest.mark.parametrize("router, top_k, rows", [("promoe", 2, 32), ("promoe_ec", 2, 30), ("ec", 1, 12), ("tc", 1, 16)])
def test_rows_of_the_routed_experts(router, top_k, rows):
    """16 tokens and 6 experts: token choice visits 16 K, expert choice 6 int(16 / 6 K)."""
    model = replace(SMALL, router=router, top_k=top_k, moe_every=4)
    assert flops_per_image(model).by_part["routed experts"] == rows * 2 * 2 * 32 * 48


@pytest.mark.parametrize("router, rows", [("promoe_ec", 40), ("diffmoe", 16)])
def test_rows_where_tokens_are_fewer_than_experts(router, rows):
    """16 tokens, 40 experts: by expert choice one token an expert; DiffMoE chooses over a batch, on average 16."""
    model = replace(SMALL, router=router, num_experts=40, moe_every=4)
    assert flops_per_image(model).by_part["routed experts"] == rows * 2 * 2 * 32 * 48


DIRECTIONS = ("world", "tp", "dp", "ep", "edp")


def first_rank(layout):
    """The mesh of rank 0, as far as slicing parameters needs it."""
    groups = {name: Group(tuple(range(size)), 0) for name, size in vars(layout).items() if name in DIRECTIONS}
    return Mesh(groups["world"], groups["tp"], groups["dp"], groups["ep"], groups["edp"], expert_tp=layout.etp > 1)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.tp=2", "model.qk_norm=layer"],
        ["parallel.tp=2", "parallel.ep=4", *(f"model.{name}={value}" for name, value in ALL_OPTIONS.items())],
        ["parallel.tp=2", "parallel.ep=2", "parallel.expert_tp=true", "model.activation=swiglu"],
        ["parallel.ep=8", "model.num_experts=12"],
        ["parallel.tp=2", "parallel.ep=4", "parallel.expert_tp=true"],
        ["model.router=diffmoe", "parallel.tp=4", "parallel.ep=2"],
        ["parallel.tp=2", "model.num_shared_experts=3", "model.shared_expert_width=24", "model.expert_width=40"],
        ["parallel.tp=4", "parallel.ep=2", "model.num_unconditional_experts=2", "parallel.expert_tp=true"],
    ],
)
def test_parameter_bytes_are_those_of_the_rank(overrides):
    config = resolve("digits", overrides=["train.deepspeed=bf16_zero1", *overrides], world=8)
    mesh = first_rank(config.layout(8))
    with torch.device("meta"):
        table = layouts(DiT(config.model)).values()
    held = sum(torch.Size(layout.local_shape(mesh)).numel() for layout in table)
    assert memory_per_rank(config, 8).parameters == 2 * held


def test_memory_of_placed_experts_is_that_of_the_rank_with_the_most(tmp_path):
    """In each block, for parameters, and for what ZeRO divides over the ranks with the same experts."""
    file = placement_file(tmp_path, 12, 4)
    settings = ["train.deepspeed=bf16_zero1", "parallel.ep=4", "model.num_experts=12"]
    config = resolve("digits", overrides=[*settings, f"parallel.placement={file}"], world=8)
    mesh, placements = first_rank(config.layout(8)), config.placements_in_file()
    slots = [placement.slots for placement in placements.values()]
    assert config.layout(8).placed_slots == tuple(slots) and min(slots) > 3 and len({*slots}) == 2
    table = initial_values(config, mesh, placements).layouts.values()
    held = sum(torch.Size(layout.local_shape(mesh)).numel() for layout in table)
    memory, consecutive = memory_per_rank(config, 8), memory_per_rank(resolve("digits", overrides=settings), 8)
    assert memory.parameters == 2 * held
    expert = sum(torch.Size(layout.shape[1:]).numel() for layout in table if layout.expert) // 2
    more = sum(slots) - 2 * 3  # experts
    assert memory.parameters - consecutive.parameters == 2 * more * expert
    assert memory.optimizer - consecutive.optimizer == 12 * more * expert // 2  # over two ranks


def test_memory_of_the_zero_stages():
    def memory(name, *overrides):
        return memory_per_rank(resolve("dit_b", overrides=[f"train.deepspeed={name}", *overrides]), 4)

    P = 130_315_808  # trainable, divisible by 4
    zero0, zero1, zero2, zero3 = (memory(f"fp32_zero{stage}") for stage in range(4))
    assert (zero0.parameters, zero0.gradients, zero0.optimizer, zero0.ema) == (4 * P, 4 * P, 8 * P, 4 * P)
    assert (zero1.parameters, zero1.gradients, zero1.optimizer, zero1.ema) == (4 * P, P, 3 * P, P)
    for choice in ("train.gradient_reduction=all_reduce", "train.accumulation=2"):  # only sums of shards are kept
        assert memory("fp32_zero1", choice).gradients == 4 * P
    assert (zero2.parameters, zero2.gradients, zero2.optimizer) == (4 * P, P, 3 * P)
    assert (zero3.parameters, zero3.gradients, zero3.device) == (P, P, 6 * P)
    half, offloaded = memory("bf16_zero2"), memory("bf16_zero2_offload")
    assert (half.parameters, half.gradients, half.optimizer, half.host) == (2 * P, P / 2, 3 * P, 0)
    assert (offloaded.device, offloaded.host) == (2.5 * P, 4 * P)


def test_experts_are_sharded_over_their_own_ranks():
    """At ep = world no other rank holds an expert's states: they are not divided any further."""
    model = resolve("promoe_s", overrides=["model.num_experts=8"]).model
    routed = parameters(model).by_part["routed experts"]
    rest = parameters(model).trainable - routed
    config = resolve("promoe_s", overrides=["model.num_experts=8", "parallel.ep=8"], world=8)
    memory = memory_per_rank(config, 8)
    assert memory.parameters == 2 * (rest + routed // 8)
    assert memory.optimizer == pytest.approx(12 * (rest / 8 + routed / 8), abs=24)
