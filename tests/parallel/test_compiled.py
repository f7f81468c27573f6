"""torch.compile: the same training, each block compiled as a whole and once.

`test_compiled_parts.py` tests blocks that are compiled in parts.
"""

import shutil

import pytest
import torch
import torch.distributed as dist
from support.backends import BACKENDS, grouped
from support.levels import full
from support.processes import run
from support.trajectory import deviations, small, stir, train
from torch._dynamo.utils import counters

from megapromoe.config.options import ConfigError
from megapromoe.distributed import collectives
from megapromoe.distributed.mesh import make_mesh
from megapromoe.nn.compile import compile_model
from megapromoe.nn.moe.layer import ROUTERS
from megapromoe.nn.parallelize import build

# Embedding, a dense block with the MoE block after it, final layer, losses.
WHOLE_BLOCKS = 4
BLOCKS = ("model.activation=swiglu", "model.norm=rms", "model.qk_norm=rms", "model.positions=rope")
BLOCKS = (*BLOCKS, "model.modulation=shared")
DEEP = "model.depth=10"
TEXT = ("data.source=unset", "model.condition=text", "model.num_classes=1000", "model.text_width=6")
TEXT = (*TEXT, "model.text_tokens=5")


def by_graph(model, mesh) -> None:
    """Compiles graphs as for inductor but runs them operator by operator, without a C++ compiler."""
    compile_model(model, "aot_eager")


def pair(overrides: tuple[str, ...], folder: str):
    """The same training eager (looped experts) and compiled (grouped experts), and what was compiled. Collective."""
    plain = train(overrides, f"{folder}/plain", prepare=None)
    with grouped():
        compiled = train(overrides, f"{folder}/compiled", prepare=by_graph)
    return plain, compiled, counters["stats"]["unique_graphs"], dict(counters["graph_break"])


@pytest.mark.parametrize(
    "graphs, overrides",
    [
        # With recomputation five more: attention half, MLP and residual apart from the experts, router; no losses. And
        # one: the attention half of an MoE block has another result, the tokens that the router scores.
        full(
            12,
            (
                *(DEEP, "parallel.ep=2", "model.router_input=unmodulated"),
                *("train.deepspeed=fp32_zero2", "parallel.recompute=moe"),
            ),
        ),
        # Without the router, which runs twice, and with the biases of the experts.
        full(11, ("parallel.tp=2", "parallel.ep=2", "parallel.recompute=all", "model.qk_norm=layer")),
        full(11, ("parallel.tp=2", "parallel.ep=2", *BLOCKS)),
        full(
            7, ("parallel.tp=2", "model.num_shared_experts=2", "model.shared_expert_width=40", "model.router=promoe_ec")
        ),
        # No losses of routers. In a region blocks are whole, as dense ones; with recomputation in parts: attention
        # half, residual, MLP, the experts.
        full(WHOLE_BLOCKS - 1, ("model.router=conditional", "parallel.tp=2", *BLOCKS)),
        full(6, ("model.router=conditional", "parallel.recompute=blocks", "train.deepspeed=fp32_zero2")),
        full(
            WHOLE_BLOCKS,
            (
                *(DEEP, *BLOCKS, *TEXT, "model.balance_weight=0.01", "model.balance_form=batch"),
                "train.deepspeed=fp32_zero2",
            ),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_training_is_the_same_and_nothing_is_compiled_twice(graphs, overrides, tmp_path):
    """Over five steps with different numbers of null images; also more blocks than torch's limit of recompilations."""
    for name in ("plain", "compiled"):
        (tmp_path / name).mkdir()
    overrides = ("train.global_batch=8", *overrides)
    for plain, compiled, made, breaks in run(2, pair, overrides, str(tmp_path)):
        assert (made, breaks) == (graphs, {})
        if plain:
            too_large = {kind: value for kind, value in deviations(compiled, plain).items() if not value[0] <= 1}
            assert not too_large


def collective_gradients(compiled: bool) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Result and gradients of x and w (3, 4) of each collective between two products, as in a layer. Collective."""
    group = make_mesh(tp=dist.get_world_size(), timeout=60).tp
    outcomes = {}
    for operation in (
        collectives.copy_to_group,
        collectives.reduce_from_group,
        collectives.differentiable_all_reduce,
        collectives.gather_last_dim,
    ):

        def layer(x, w, operation=operation):
            y = operation(x * w, group)
            return y + 0.5 * y.square()

        generator = torch.Generator().manual_seed(dist.get_rank())
        x, w = (torch.randn(3, 4, generator=generator).requires_grad_() for _ in range(2))
        run_layer = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        y = run_layer(x, w)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        outcomes[operation.__name__] = (y.detach(), x.grad, w.grad)
    return outcomes


@pytest.mark.full
def test_collectives_have_the_same_gradients_compiled():
    """Torch 2.11 loses the gradient of a tensor that a compiled autograd.Function changed in place and returned."""
    plain, compiled = (run(2, collective_gradients, flag) for flag in (False, True))
    for ours, theirs in zip(compiled, plain, strict=True):
        for name, tensors in theirs.items():
            assert all(tensor.norm() > 0.1 for tensor in tensors), name
            for tensor, expected in zip(ours[name], tensors, strict=True):
                torch.testing.assert_close(tensor, expected, msg=lambda text, name=name: f"{name}: {text}")


COMPILED_CASES = {
    "promoe": (),
    "two experts a token": (
        *("model.top_k=2", "model.num_shared_experts=2", "model.num_unconditional_experts=2"),
        "model.balance_weight=0.01",
    ),
    "capacity, unmodulated": ("model.capacity_factor=1.25", "model.router_input=unmodulated", "model.top_k=2"),
    "promoe_ec": ("model.router=promoe_ec",),
    "promoe_linear": ("model.router=promoe_linear", "model.balance_weight=0.01"),
    "tc": ("model.router=tc", "model.top_k=2", "model.balance_bias=0.01"),
    "ec": ("model.router=ec",),
    "diffmoe": ("model.router=diffmoe",),
    "classification": ("model.router=classification", "model.superclasses=modulo"),
    "kmeans": ("model.router=kmeans",),
    "race": ("model.router=race",),
    "gmm": ("model.router=gmm", "model.top_k=2"),
    "no unconditional expert": ("model.unconditional_expert=false", "model.shared_expert=false"),
    "dense": ("model.router=dense",),
    "conditional": ("model.router=conditional",),
    "conditional without shared experts": ("model.router=conditional", "model.shared_expert=false"),
    "three blocks": ("model.depth=3", "model.moe_every=1", "model.top_k=2", "model.score_function=sigmoid"),
}
LOOPED = ("two experts a token",)


@pytest.mark.parametrize("case", [name if name == "promoe" else full(name) for name in COMPILED_CASES])
def test_two_blocks_are_one_graph_for_any_number_of_null_images(case):
    """Of every router; outputs, losses, state and gradients are those of the eager model."""
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (build(small("model.depth=2", *COMPILED_CASES[case])).train() for _ in range(2))
    for model in (plain, compiled):
        stir(model, make_mesh())
    by_graph(compiled, None)
    graphs = WHOLE_BLOCKS if compiled.config.moe_blocks else WHOLE_BLOCKS - 1
    graphs += len(compiled.blocks) % 2  # the last block is a graph of its own
    for conditional in (3, 0, 4, 1, 2):
        with BACKENDS["looped" if case in LOOPED else "grouped"]():
            (y, gradients), (y_plain, gradients_plain) = (outcome(model, 4, conditional) for model in (compiled, plain))
        torch.testing.assert_close(y, y_plain, rtol=1e-4, atol=1e-5)
        for (name, parameter), ours, theirs in zip(plain.named_parameters(), gradients, gradients_plain, strict=True):
            if theirs is None:
                assert ours is None or not ours.any(), name
                continue
            parts = zip(ours, theirs, strict=True) if ".experts." in name else [(ours, theirs)]
            for number, (part, expected) in enumerate(parts):  # experts with few rows have small gradients
                limit = 1e-4 * float(expected.abs().max()) + 1e-7
                torch.testing.assert_close(
                    part, expected, rtol=1e-4, atol=limit, msg=f"{name} {number} {parameter.shape}"
                )
        for (name, buffer), expected in zip(compiled.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(buffer, expected, msg=name)
        assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (graphs, {}), conditional


def test_every_router_is_compiled():
    compiled = {option.removeprefix("model.router=") for options in COMPILED_CASES.values() for option in options}
    assert {"promoe", *ROUTERS} <= compiled | {"promoe"}


def outcome(model, images: int, conditional: int):
    x = torch.randn(images, 4, 8, 8, generator=torch.Generator().manual_seed(conditional))
    y = torch.arange(images)
    y[conditional:] = 10
    model.zero_grad()
    prediction, auxiliary = model(x, torch.linspace(0, 999, images), y, conditional)
    if model.training:
        (prediction.square().mean() + auxiliary.total()).backward()
    return prediction.detach(), [p.grad for p in model.parameters()]


def test_evaluation_stays_eager():
    """Batches of samples may have any size, so they must be neither compiled nor refused."""

    def refuse(graph, inputs):
        raise RuntimeError("asked to compile")

    model = build(small("model.depth=2"))
    compile_model(model, refuse)
    outcome(model.eval(), 3, 2)
    with pytest.raises(Exception, match="asked to compile"):
        outcome(model.train(), 3, 2)


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile makes C++ on a CPU, and there is no g++")
def test_compiled_by_inductor():
    """As `train.compile` does it, by inductor; a dense block and one with experts."""
    what = ("model.depth=2", "model.moe_every=2", "model.hidden_size=32")
    plain, compiled = build(small(*what)).train(), build(small(*what, "train.compile=true")).train()
    for model in (plain, compiled):
        stir(model, make_mesh())
    for conditional in (3, 2):
        with grouped():
            (y, gradients), (y_plain, gradients_plain) = (outcome(model, 4, conditional) for model in (compiled, plain))
        torch.testing.assert_close(y, y_plain, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(gradients, gradients_plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "input_size, backend, options",
    [
        (128, "inductor", {"triton.mix_order_reduction": False}),
        (126, "inductor", {}),
        (128, "aot_eager", {}),
    ],
)
def test_fusions_that_lose_gradients_of_long_sequences_are_off(input_size, backend, options, monkeypatch):
    """Only GPUs have this fusion; this test checks that inductor gets the option and that torch has it."""
    from torch._inductor import list_options

    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, **settings: calls.append(settings["options"] or {}) or f)
    compile_model(build(small("model.depth=2", f"model.input_size={input_size}")), backend)
    # Blocks without and with experts, embedding, final layer, losses.
    assert len(calls) == 5 and all(set(call) <= set(list_options()) for call in calls)
    assert all({name: call[name] for name in call if "mix_order" in name} == options for call in calls)
    assert sum("triton.prefer_nd_tiling" in call for call in calls) == (backend == "inductor")


def test_stage_3_is_refused():
    with pytest.raises(ConfigError, match="train.compile = True: must be false with train.deepspeed = 'fp32_zero3'"):
        small("train.compile=true", "train.deepspeed=fp32_zero3")
