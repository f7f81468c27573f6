"""What a step costs in counts, which are the same on every machine: operators, messages, waits, memory, compilations.

As on a GPU that has grouped products, but where experts one by one are spoken of.
The numbers are expectations. One that falls is good news, to be written down here; one that rises is a regression.
"""

from collections import Counter as Tally
from functools import cache

import pytest
import torch
from support.backends import WAYS, grouped
from support.processes import run
from support.trajectory import small
from torch.utils._python_dispatch import TorchDispatchMode

from megapromoe.benchmark.counters import Counter, Counts
from megapromoe.benchmark.layer import Settings, first_layer, necessary
from megapromoe.config.resolve import resolve
from megapromoe.distributed.mesh import make_mesh
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.nn.moe.prototypes import Contrast
from megapromoe.nn.parallelize import build
from megapromoe.planning.roofline import EXPERT_KERNELS, GROUPED_KERNELS

IMAGES, NULL = 4, 1

# ---- one MoE layer


def layer(*overrides: str, dtype=torch.float32, images: int = IMAGES, way: str = "grouped", routing: str = "real"):
    """Counts of one layer of ProMoE-S, forward and backward; what it allocates at most over what it must."""
    config = resolve("promoe_s", overrides=["model.hidden_size=96", "model.num_experts=4", *overrides])
    settings = Settings(torch.device("cpu"), dtype, 1, 1, images, (), null=NULL / IMAGES)
    moe, x_BSD = first_layer(config, routing, settings)
    moe.train()
    grad_BSD, y_B = torch.ones_like(x_BSD), torch.zeros(images, dtype=torch.long)
    with WAYS[way](), Counter() as counter:
        counter.phase("route")
        routed = moe.route(x_BSD, settings.conditional, y_B)
        counter.phase("forward")
        y_BSD = moe(x_BSD, routed, settings.conditional)
        counter.phase("losses")
        losses = list(moe.losses_of([routed]).values())
        counter.phase("backward")
        torch.autograd.backward([y_BSD, *losses], [grad_BSD, *map(torch.ones_like, losses)])
    peak = counter.live(without=[p.grad for p in moe.parameters()])
    return counter.phases, peak / necessary(config.model, settings, x_BSD.element_size(), dense=False)


def kernels(phases: dict[str, Counts]) -> tuple[int, ...]:
    return tuple(phases[name].kernels for name in ("route", "forward", "losses", "backward"))


def allocations(phases: dict[str, Counts]) -> int:
    return sum(one.allocations for one in phases.values())


# Operators of router, forward pass, losses and backward pass; allocations of all together.
LAYER = {
    (): ((17, 22, 22, 69), 108),
    ("model.top_k=2",): ((18, 24, 22, 72), 113),
    ("model.rcl_weight=0",): ((16, 22, 0, 50), 75),
    ("model.capacity_factor=1.25",): ((17, 49, 22, 75), 136),
    ("model.router=promoe_ec",): ((47, 22, 1, 83), 135),
    ("model.router=kmeans",): ((66, 22, 0, 54), 132),
    ("model.router=promoe_linear",): ((11, 22, 0, 41), 67),
    ("model.router=tc",): ((11, 16, 0, 26), 48),
    ("model.router=ec",): ((15, 16, 0, 27), 56),
    ("model.router=diffmoe",): ((25, 16, 1, 39), 76),
}


@pytest.mark.parametrize("what", LAYER, ids=" ".join)
def test_operators_and_allocations_do_not_depend_on_the_number_of_experts(what):
    """No work per expert: 64 experts launch and allocate what 4 do."""
    few, many = (layer(*what, f"model.num_experts={experts}")[0] for experts in (4, 64))
    assert kernels(few) == kernels(many) and allocations(few) == allocations(many)
    launches, most = LAYER[what]
    assert all(ours <= expected for ours, expected in zip(kernels(few), launches, strict=True)), kernels(few)
    assert allocations(few) <= most


def test_experts_one_by_one_cost_ten_operators_each_and_one_read():
    """Where torch has no grouped product in one kernel: two products and a GELU forward, seven operators backward."""
    few, many, in_groups = (
        layer(f"model.num_experts={experts}", way=way, routing="balanced")[0]
        for experts, way in ((4, "expert by expert"), (64, "expert by expert"), (4, "grouped"))
    )
    more = [b - a for a, b in zip(kernels(few), kernels(many), strict=True)]
    assert more == [0, 3 * 60, 0, 7 * 60]
    assert sum(kernels(few)) - sum(kernels(in_groups)) == 4 * EXPERT_KERNELS - GROUPED_KERNELS  # planned with
    for phases in (few, many):
        assert sum((one.waits for one in phases.values()), Tally()) == {"tolist": 1}


def test_losses_of_all_layers_are_computed_at_once():
    """The contrastive loss of four layers launches what that of one does, forward and backward."""
    settings = Settings(torch.device("cpu"), torch.float32, 1, 1, IMAGES, (), null=NULL / IMAGES)
    moe, x_BSD = first_layer(resolve("digits"), "real", settings)
    routed = moe.train().route(x_BSD, settings.conditional)

    def launched(layers: int) -> int:
        leaf = Contrast(*(tensor.detach().requires_grad_() for tensor in routed.contrast))
        with Counter() as counter:
            (loss_L,) = moe.losses_of([routed._replace(contrast=leaf)] * layers).values()
            loss_L.sum().backward()
        return counter.total.kernels - 2 * (layers - 1)  # autograd adds up what the leaves get from each layer

    assert launched(4) == launched(1) <= 50


@pytest.mark.parametrize("what", LAYER, ids=" ".join)
def test_a_layer_on_one_rank_reads_nothing_back(what):
    """DiffMoE alone has to: how many tokens its experts take of one rank's is in the scores."""
    phases, _ = layer(*what)
    waits = sum((one.waits for one in phases.values()), Tally())
    assert waits == ({"nonzero": 1} if what == ("model.router=diffmoe",) else {})


@pytest.mark.parametrize(
    "what, dtype, limit",
    [
        ((), torch.float32, 1.05),
        (("model.top_k=2",), torch.float32, 1.05),
        (("model.num_experts=64",), torch.float32, 1.2),
        (("model.capacity_factor=1.25",), torch.float32, 1.05),
        ((), torch.bfloat16, 1.2),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_needs_little_more_memory_than_it_must(what, dtype, limit, way):
    """The necessary tensors are listed in `benchmark.layer.necessary`; scores T×E and indices are not among them."""
    _, over = layer(*what, dtype=dtype, way=way)
    assert 0.95 < over < limit


# ---- a whole step


class Names(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.seen = Tally()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.seen[function._schema.name.partition("::")[2]] += 1
        return function(*arguments, **(named or {}))


def steps(cases: list[tuple[str, ...]]) -> list[tuple]:
    with grouped():
        return [step(overrides) for overrides in cases]


def step(overrides: tuple[str, ...]) -> tuple[dict[str, Counts], Tally, int]:
    """An optimizer step after two others, by phase; the operators of its update; partitions. Collective."""
    config = small("train.global_batch=8", *overrides)
    mesh = make_mesh(config.parallel.tp, config.parallel.ep, timeout=60)
    engine = Engine(build(config, mesh), config, mesh)
    ema = EMA(engine, 0.5)
    B = config.layout(mesh.world).micro_batch

    def batch():
        y = torch.randint(10, (B,))
        y[B - NULL :] = 10
        return torch.randn(B, 4, 8, 8), 1000 * torch.rand(B), y, B - NULL

    def loss(prediction, auxiliary):
        counter.phase("loss")
        total = prediction.float().square().mean() + auxiliary.total()
        counter.phase("backward")
        return total, total.detach()

    for _ in range(3):
        inputs = batch()
        with Counter() as counter:
            report = engine.micro_step(*inputs, loss=loss)
            counter.phase("update")
            result = engine.step(1e-3, report)
            counter.phase("ema")
            ema.update(result)
    inputs, phases = batch(), counter.phases
    with Counter() as counter:
        report = engine.micro_step(*inputs, loss=loss)
    with Names() as names:
        engine.step(1e-3, report)
    partitions = len(engine.partitions)
    engine.close()
    return phases, names.seen, partitions


FILES = ("fp32_zero0", "fp32_zero1", "bf16_zero1", "bf16_zero2")
ALONE = [(f"model.depth={depth}", f"train.deepspeed={file}") for file in FILES for depth in (2, 4)]
TOGETHER = [("model.depth=4", "parallel.ep=2", f"train.deepspeed={file}") for file in ("fp32_zero1", "bf16_zero1")]


@cache
def counted(world: int) -> list[dict]:
    """Of each rank, case -> what `step` found."""
    cases = ALONE if world == 1 else TOGETHER
    return [dict(zip(cases, found, strict=True)) for found in run(world, steps, cases)]


@pytest.mark.parametrize("file", FILES)
def test_the_update_launches_nothing_for_each_parameter(file):
    """Norm, clip, AdamW and the averages are fused: twice the blocks take the same number of operators."""
    (shallow, seen, _), (deep, seen_deep, partitions) = (
        counted(1)[0][f"model.depth={depth}", f"train.deepspeed={file}"] for depth in (2, 4)
    )
    assert shallow["update"].kernels == deep["update"].kernels <= (17 if file == "fp32_zero0" else 65)
    # A lerp of each partition, and its weight: 0 where the step was not applied, which the host need not know.
    assert shallow["ema"].kernels == deep["ema"].kernels == (1 if file == "fp32_zero0" else 1 + partitions)
    for one in (seen, seen_deep):
        assert one["_fused_adamw_"] == 2  # experts and the rest
        assert one["_foreach_norm"] == 1
    if file != "fp32_zero0":  # there the model's own parameters are stepped, each a partition
        assert partitions == 2


# Operators and allocations of forward, backward and update: four blocks, two with experts.
STEP = {
    (1, "fp32_zero0"): ((193, 196), (390, 309), (17, 76)),
    (1, "fp32_zero1"): ((193, 196), (460, 311), (46, 100)),
    (1, "bf16_zero1"): ((202, 205), (472, 321), (48, 102)),
    (1, "bf16_zero2"): ((202, 205), (472, 321), (48, 102)),
    (2, "fp32_zero1"): ((223, 232), (437, 322), (46, 70)),
    (2, "bf16_zero1"): ((232, 241), (449, 331), (48, 72)),
}


@pytest.mark.parametrize("world, file", STEP)
def test_a_step_launches_and_allocates_no_more(world, file):
    """The messages' buffers and DeepSpeed's hooks included; `world` ranks with as many parts of the experts."""
    for rank in counted(world):
        (phases,) = (
            found[0] for case, found in rank.items() if {"model.depth=4", f"train.deepspeed={file}"} <= {*case}
        )
        for name, expected in zip(("forward", "backward", "update"), STEP[world, file], strict=True):
            found = phases[name].kernels, phases[name].allocations
            assert all(ours <= most for ours, most in zip(found, expected, strict=True)), (name, found)


# DeepSpeed looks at a number that says "go on", which is the host's.
GO_ON = {"_local_scalar_dense": 1}


@pytest.mark.parametrize("file", FILES)
def test_a_step_reads_nothing_back(file):
    """At stage 0 the host decides, and reads the norm and the votes once."""
    for case, (phases, _, _) in counted(1)[0].items():
        if case[1].endswith(file):
            waits = {name: dict(one.waits) for name, one in phases.items() if one.waits}
            assert waits == {"update": {"tolist": 1} if file == "fp32_zero0" else GO_ON}


def test_with_ep_each_layer_reads_its_counts_once():
    for rank in counted(2):
        for phases, _, _ in rank.values():
            waits = {name: dict(one.waits) for name, one in phases.items() if one.waits}
            assert waits == {"forward": {"tolist": 2}, "update": GO_ON}


@pytest.mark.parametrize("file, width", [("fp32_zero1", 4), ("bf16_zero1", 2)])
def test_messages_of_a_step(file, width):
    """Two MoE layers: counts, rows out, rows home; of both at once, sums and counts for the contrastive loss. Then the
    gradients, of experts' and of other parameters (a group of one for the former: nothing travels), the vote, the
    parameters."""
    D, E, S, L, B = 32, 4, 16, 2, 4
    rows = 0
    for rank in counted(2):
        phases, _, _ = rank["model.depth=4", "parallel.ep=2", f"train.deepspeed={file}"]
        calls = {name: dict(one.collectives) for name, one in phases.items() if one.collectives}
        assert calls == {
            "forward": {"alltoall_base_": 3 * L, "allreduce_": 1},
            "backward": {"alltoall_base_": 2 * L, "allreduce_": 1 + 2},
            "update": {"allreduce_": 1, "_allgather_base_": 1},
        }
        sent = {name: dict(one.sent) for name, one in phases.items()}
        assert sent["forward"]["allreduce_"] == L * (E * D + E) * 4
        assert sent["update"]["allreduce_"] == 16
        rows += sent["forward"]["alltoall_base_"] - L * E * 8 // 2
    # On both ranks together: each row that leaves comes home, so an even number of rows, and no more than there are.
    assert rows % (2 * D * width) == 0 and 0 < rows <= 2 * 2 * L * (B - NULL) * S * D * width


def test_nothing_is_compiled():
    assert not any(one.compiled for rank in counted(1) for phases, _, _ in rank.values() for one in phases.values())


def test_a_step_in_bf16_launches_little_more_than_in_fp32():
    """Float32 is for scores and sums: a cast here and there, none for each parameter."""
    fp32, bf16 = (counted(1)[0]["model.depth=4", f"train.deepspeed={file}"][0] for file in ("fp32_zero1", "bf16_zero1"))
    for phase in ("forward", "backward", "update"):
        assert bf16[phase].kernels <= 1.06 * fp32[phase].kernels + 2
