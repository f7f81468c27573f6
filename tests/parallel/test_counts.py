"""The cost of a step in counts that do not depend on the machine: operators, messages, waits, memory, compilations.

Experts use grouped products, as on a GPU that has them, except in tests of looped experts. A count that rises is a
regression; one that falls is an improvement, after which the expectation in this file is lowered.
"""

from collections import Counter as Tally
from functools import cache

import pytest
import torch
from support.backends import BACKENDS, grouped
from support.levels import full
from support.processes import run
from support.trajectory import small
from torch.utils._python_dispatch import TorchDispatchMode

from megapromoe.benchmark.counters import Counter, Counts
from megapromoe.benchmark.layer import Settings, first_layer, necessary_bytes
from megapromoe.config.resolve import resolve
from megapromoe.distributed.mesh import make_mesh
from megapromoe.engine.averaged_weights import EMA
from megapromoe.engine.engine import Engine
from megapromoe.nn.moe.auxiliary import auxiliary_losses
from megapromoe.nn.moe.layer import auxiliary_of
from megapromoe.nn.moe.prototypes import ContrastiveInputs
from megapromoe.nn.parallelize import build
from megapromoe.planning.roofline import EXPERT_KERNELS, GROUPED_KERNELS

IMAGES, NULL = 4, 1

# ---- one MoE layer


def layer(*overrides: str, dtype=torch.float32, images: int = IMAGES, backend: str = "grouped", routing: str = "real"):
    """Counts of one layer of ProMoE-S, forward and backward; and its peak of memory over what is necessary."""
    config = resolve("promoe_s", overrides=["model.hidden_size=96", "model.num_experts=4", *overrides])
    settings = Settings(torch.device("cpu"), dtype, 1, 1, images, (), null=NULL / IMAGES)
    moe, x_BSD = first_layer(config, routing, settings)
    moe.train()
    grad_BSD, y_B = torch.ones_like(x_BSD), torch.zeros(images, dtype=torch.long)
    with BACKENDS[backend](), Counter() as counter:
        counter.phase("route")
        inputs, routed = moe.route(x_BSD, settings.num_conditional, y_B)
        counter.phase("forward")
        y_BSD, dropped = moe.run_experts(*inputs)
        counter.phase("losses")
        losses = list(auxiliary_losses([auxiliary_of(routed, dropped)]).values())
        counter.phase("backward")
        torch.autograd.backward([y_BSD, *losses], [grad_BSD, *map(torch.ones_like, losses)])
    peak = counter.live(without=[p.grad for p in moe.parameters()])
    return counter.phases, peak / necessary_bytes(config.model, settings, x_BSD.element_size(), dense=False)


def kernels(phases: dict[str, Counts]) -> tuple[int, ...]:
    return tuple(phases[name].kernels for name in ("route", "forward", "losses", "backward"))


def allocations(phases: dict[str, Counts]) -> int:
    return sum(counts.allocations for counts in phases.values())


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
    """64 experts launch and allocate as much as 4."""
    of_4, of_64 = (layer(*what, f"model.num_experts={experts}")[0] for experts in (4, 64))
    assert kernels(of_4) == kernels(of_64) and allocations(of_4) == allocations(of_64)
    launches, max_allocations = LAYER[what]
    assert all(ours <= expected for ours, expected in zip(kernels(of_4), launches, strict=True)), kernels(of_4)
    assert allocations(of_4) <= max_allocations


def test_looped_experts_cost_ten_operators_each_and_one_read():
    """Two products and a GELU forward, seven operators backward; one read of the row counts by the host."""
    of_4, of_64, grouped_4 = (
        layer(f"model.num_experts={experts}", backend=backend, routing="balanced")[0]
        for experts, backend in ((4, "looped"), (64, "looped"), (4, "grouped"))
    )
    more = [b - a for a, b in zip(kernels(of_4), kernels(of_64), strict=True)]
    assert more == [0, 3 * 60, 0, 7 * 60]
    planned = 4 * EXPERT_KERNELS - GROUPED_KERNELS
    assert sum(kernels(of_4)) - sum(kernels(grouped_4)) == planned
    for phases in (of_4, of_64):
        assert sum((counts.waits for counts in phases.values()), Tally()) == {"tolist": 1}


def test_losses_of_all_layers_are_computed_at_once():
    """The contrastive loss of four layers launches as many operators as that of one, forward and backward."""
    settings = Settings(torch.device("cpu"), torch.float32, 1, 1, IMAGES, (), null=NULL / IMAGES)
    moe, x_BSD = first_layer(resolve("digits"), "real", settings)
    _, auxiliary = moe.train()(x_BSD, settings.num_conditional)

    def launched(layers: int) -> int:
        inputs = auxiliary.joint_losses["rcl"]
        assert isinstance(inputs, ContrastiveInputs)
        leaves = [tensor.detach().requires_grad_() for tensor in (inputs.prototype_ED, inputs.sum_ED, inputs.count_E)]
        leaf = ContrastiveInputs(*leaves, inputs.weight, inputs.temperature, inputs.group)
        with Counter() as counter:
            (loss_L,) = auxiliary_losses([auxiliary._replace(joint_losses={"rcl": leaf})] * layers).values()
            loss_L.sum().backward()
        return counter.total.kernels - 2 * (layers - 1)  # autograd adds up the layers' gradients of the leaves

    assert launched(4) == launched(1) <= 50


@pytest.mark.parametrize("what", LAYER, ids=" ".join)
def test_a_layer_on_one_rank_reads_nothing_back(what):
    """Except for DiffMoE: how many tokens of a rank an expert takes depends on the scores."""
    phases, _ = layer(*what)
    waits = sum((counts.waits for counts in phases.values()), Tally())
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
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_needs_little_more_memory_than_it_must(what, dtype, limit, backend):
    """`benchmark.layer.necessary_bytes` lists the necessary tensors; it leaves out scores (T×E) and indices."""
    _, over = layer(*what, dtype=dtype, backend=backend)
    assert 0.95 < over < limit


# ---- a whole step


class Names(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.counts = Tally()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.counts[function._schema.name.partition("::")[2]] += 1
        return function(*arguments, **(named or {}))


def steps(cases: list[tuple[str, ...]]) -> list[tuple]:
    with grouped():
        return [step(overrides) for overrides in cases]


def step(overrides: tuple[str, ...]) -> tuple[dict[str, Counts], Tally, int]:
    """An optimizer step after two others, by phase; the operators of its update; partitions. Collective."""
    config = small("train.global_batch=8", *overrides)
    mesh = make_mesh(config.parallel.tp, config.parallel.ep, timeout=60)
    engine = Engine(build(config, mesh), config, mesh)
    ema = EMA(engine, [0.5])
    B = config.layout(mesh.world_size).micro_batch

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
    return phases, names.counts, partitions


FILES = ("fp32_zero0", "fp32_zero1", "bf16_zero1", "bf16_zero2")
ONE_RANK = [(f"model.depth={depth}", f"train.deepspeed={file}") for file in FILES for depth in (2, 4)]
TWO_RANKS = [("model.depth=4", "parallel.ep=2", f"train.deepspeed={file}") for file in ("fp32_zero1", "bf16_zero1")]


@cache
def counted(world: int) -> list[dict]:
    """For each rank: case -> result of `step`."""
    cases = ONE_RANK if world == 1 else TWO_RANKS
    return [dict(zip(cases, results, strict=True)) for results in run(world, steps, cases)]


@pytest.mark.parametrize("file", FILES)
def test_the_update_launches_nothing_for_each_parameter(file):
    """Norm, clip, AdamW and the averages are fused: twice the blocks take the same number of operators."""
    (shallow, operators, _), (deep, deep_operators, partitions) = (
        counted(1)[0][f"model.depth={depth}", f"train.deepspeed={file}"] for depth in (2, 4)
    )
    assert shallow["update"].kernels == deep["update"].kernels <= (17 if file == "fp32_zero0" else 65)
    # A lerp of each partition, and its weight, which is 0 on the device if the step was not applied.
    assert shallow["ema"].kernels == deep["ema"].kernels == (1 if file == "fp32_zero0" else 1 + partitions)
    for counts in (operators, deep_operators):
        assert counts["_fused_adamw_"] == 2  # experts and the rest
        assert counts["_foreach_norm"] == 1
    if file != "fp32_zero0":  # at stage 0 each parameter of the model is a partition
        assert partitions == 2


# Operators and allocations of forward, backward and update: four blocks, two with experts.
STEP = {
    (1, "fp32_zero0"): ((193, 196), (390, 307), (17, 76)),
    (1, "fp32_zero1"): ((193, 196), (388, 309), (44, 98)),
    (1, "bf16_zero1"): ((202, 205), (395, 316), (46, 100)),
    (1, "bf16_zero2"): ((202, 205), (395, 316), (46, 100)),
    (2, "fp32_zero1"): ((223, 232), (395, 321), (44, 74)),
    (2, "bf16_zero1"): ((232, 241), (403, 329), (46, 76)),
}


@pytest.mark.parametrize("world, file", [case if case[0] == 1 else full(*case) for case in STEP])
def test_a_step_launches_and_allocates_no_more(world, file):
    """Includes the buffers of messages and DeepSpeed's hooks; `world` is the number of ranks and ep."""
    for rank in counted(world):
        (phases,) = (
            result[0] for case, result in rank.items() if {"model.depth=4", f"train.deepspeed={file}"} <= {*case}
        )
        for name, expected in zip(("forward", "backward", "update"), STEP[world, file], strict=True):
            measured = phases[name].kernels, phases[name].allocations
            assert all(ours <= limit for ours, limit in zip(measured, expected, strict=True)), (name, measured)


# DeepSpeed reads the overflow flag, a tensor that is on the host already.
HOST_READ = {"_local_scalar_dense": 1}


@pytest.mark.parametrize("file", FILES)
def test_a_step_reads_nothing_back(file):
    """At stage 0 the host decides, and reads the norm and the votes once."""
    for case, (phases, _, _) in counted(1)[0].items():
        if case[1].endswith(file):
            waits = {name: dict(counts.waits) for name, counts in phases.items() if counts.waits}
            assert waits == {"update": {"tolist": 1} if file == "fp32_zero0" else HOST_READ}


@pytest.mark.full
def test_with_ep_each_layer_reads_its_counts_once():
    for rank in counted(2):
        for phases, _, _ in rank.values():
            waits = {name: dict(counts.waits) for name, counts in phases.items() if counts.waits}
            assert waits == {"forward": {"tolist": 2}, "update": HOST_READ}


@pytest.mark.parametrize("file, width", [("fp32_zero1", 4), ("bf16_zero1", 2)])
def test_messages_of_a_step(file, width):
    """Of M = 2 MoE layers: row counts, dispatch and combine; for both together, statistics of the contrastive loss.
    Then the gradients of replicated parameters, which gloo reduce-scatters by an all-to-all, the norm with the votes to
    stop, and the parameters. No other rank has the same experts."""
    D, E, S, M, B = 32, 4, 16, 2, 4
    rows = 0
    for rank in counted(2):
        phases, _, _ = rank["model.depth=4", "parallel.ep=2", f"train.deepspeed={file}"]
        calls = {name: dict(counts.collectives) for name, counts in phases.items() if counts.collectives}
        assert calls == {
            "forward": {"alltoall_base_": 3 * M, "allreduce_": 1},
            "backward": {"alltoall_base_": 2 * M + 1, "allreduce_": 1},
            "update": {"allreduce_": 1, "_allgather_base_": 1},
        }
        sent = {name: dict(counts.sent) for name, counts in phases.items()}
        assert sent["forward"]["allreduce_"] == M * (E * D + E) * 4
        assert sent["update"]["allreduce_"] == 16
        rows += sent["forward"]["alltoall_base_"] - M * E * 8 // 2
    # On both ranks together each row is sent twice, to its expert and back; there are 2·M·(B - NULL)·S rows.
    assert rows % (2 * D * width) == 0 and 0 < rows <= 2 * 2 * M * (B - NULL) * S * D * width


def test_nothing_is_compiled():
    assert not any(
        counts.compiled for rank in counted(1) for phases, _, _ in rank.values() for counts in phases.values()
    )


def test_a_step_in_bf16_launches_little_more_than_in_fp32():
    """Scores and sums are float32: that adds some casts, but none for each parameter."""
    fp32, bf16 = (counted(1)[0]["model.depth=4", f"train.deepspeed={file}"][0] for file in ("fp32_zero1", "bf16_zero1"))
    for phase in ("forward", "backward", "update"):
        assert bf16[phase].kernels <= 1.06 * fp32[phase].kernels + 2
