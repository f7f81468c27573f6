"""Blocks that send messages, compiled in parts between them: results, numbers of graphs, order of events."""

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from support.backends import BACKENDS
from support.dispatch_cases import recorded_messages
from support.levels import full
from support.processes import run
from support.trajectory import small, stir
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from megapromoe.config.expert_placement import ExpertPlacement, Placements
from megapromoe.distributed.mesh import make_mesh
from megapromoe.nn.compile import compile_model
from megapromoe.nn.parallelize import build

IMAGES = 4
# Conditional images of each step, of the first data rank and of the others.
CONDITIONAL = ((3, 2), (0, 4), (4, 1), (1, 0), (0, 0))
SKEWED = 3  # the step whose tokens all choose the same experts


def outcome(model, conditional: int, seed: int, skewed: bool):
    """Prediction, losses and gradients of a pass over images that depend on the seed."""
    x = torch.randn(IMAGES, 4, *2 * [model.config.input_size], generator=torch.Generator().manual_seed(seed))
    x = torch.full_like(x, 50.0) if skewed else x
    y = torch.arange(IMAGES)
    y[conditional:] = 10
    model.zero_grad()
    prediction, auxiliary = model(x, torch.linspace(0, 999, IMAGES), y, conditional)
    (prediction.square().mean() + auxiliary.total()).backward()
    values = {"prediction": prediction.detach(), **{name: loss.detach() for name, loss in auxiliary.losses.items()}}
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return values | gradients, auxiliary.load_ME


def compiles(rank: int, world: int) -> bool:
    """Whether a rank compiles: two of a job do. Eager and compiled blocks send the same messages."""
    return rank in (0, world - 1)


def compared(overrides: tuple[str, ...], backend: str, placements: Placements | None = None) -> dict:
    """What differs from the eager model in steps with other images, and the graphs that were made. Collective."""
    torch._dynamo.reset()
    counters.clear()
    config = small("model.depth=2", "model.moe_every=1", *overrides)
    mesh = make_mesh(config.parallel.tp, config.parallel.ep, config.parallel.expert_tp, timeout=60)
    plain, compiled = (build(config, mesh, placements=placements).train() for _ in range(2))
    for model in (plain, compiled):
        stir(model, mesh)
    if compiles(mesh.rank, mesh.world_size):
        compile_model(compiled, "aot_eager")
    differing, graphs, unused = [], [], 0
    for step, conditional in enumerate(CONDITIONAL):
        arguments = conditional[mesh.dp.rank > 0], 100 * step + mesh.dp.rank, step == SKEWED
        with BACKENDS[backend]():
            (ours, _), (theirs, load_ME) = outcome(compiled, *arguments), outcome(plain, *arguments)
        dist.all_reduce(load_ME)
        unused += int((load_ME == 0).sum()) if step == SKEWED else 0
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            # Experts with few rows have small gradients.
            pairs = [(ours[name], expected)] if ".experts." not in name else zip(ours[name], expected, strict=True)
            for number, (part, expected_part) in enumerate(pairs):
                limit = 1e-4 * float(expected_part.abs().max()) + 1e-7
                if not torch.allclose(part, expected_part, rtol=1e-4, atol=limit):
                    differing.append((step, name, number, float((part - expected_part).abs().max())))
        for (name, buffer), expected in zip(compiled.named_buffers(), plain.buffers(), strict=True):
            if not torch.allclose(buffer, expected, rtol=1e-5, atol=1e-6):
                differing.append((step, name))
        graphs.append(counters["stats"]["unique_graphs"])
    return {"differing": differing, "graphs": graphs, "breaks": dict(counters["graph_break"]), "unused": unused}


EP, TP, BOTH = ("parallel.ep=2",), ("parallel.tp=2",), ("parallel.tp=2", "parallel.ep=2")
NINE = ("model.input_size=6",)  # tokens of an image, which two ranks cannot divide evenly
# Always: embedding, final layer, losses. Between messages of ep: begin, hidden, outputs, dense, end. In a region of tp:
# route, local, finish. With both: route, arrange, hidden, outputs, dense, combine, finish.
CASES = [
    (2, 8, EP, "grouped"),
    full(2, 8, (*EP, "model.top_k=2", "model.num_experts=3", "model.capacity_factor=0.75"), "looped"),
    full(2, 8, (*EP, "model.router=diffmoe"), "looped"),
    full(2, 6, (*TP, *NINE, "model.top_k=2", "model.score_function=softmax"), "grouped"),
    full(2, 10, (*BOTH, *NINE, "model.router=kmeans"), "looped"),
    full(4, 10, (*BOTH, "parallel.expert_tp=true", "model.router=promoe_ec"), "looped"),
]


@pytest.mark.parametrize("world, graphs, overrides, backend", CASES, ids=lambda value: str(value))
def test_parts_compute_the_same_and_are_compiled_once(world, graphs, overrides, backend):
    """With any number of null images, also where ranks have all and none, and where one expert gets all tokens.

    Per expert, so that those with few rows count. All blocks share the graphs.
    """
    for rank, result in enumerate(run(world, compared, overrides, backend)):
        assert not result["differing"]
        expected = len(CONDITIONAL) * [graphs if compiles(rank, world) else 0]
        assert (result["graphs"], result["breaks"]) == (expected, {})
        experts_choose = {"model.router=diffmoe", "model.router=promoe_ec"} & {*overrides}
        assert experts_choose or result["unused"], "no expert was without tokens"


@pytest.mark.full
def test_blocks_with_other_experts_on_a_rank_share_the_graphs():
    """The slots of experts are a table, not a constant of the graph; ranks may have different numbers of them."""
    placements = {0: ExpertPlacement(((2,), (0, 1))), 1: ExpertPlacement(((0, 2), (1,)))}
    for result in run(2, compared, (*EP, "model.num_experts=3"), "looped", placements):
        assert not result["differing"]
        assert (result["graphs"], result["breaks"]) == (len(CONDITIONAL) * [8], {})


PARTS = ("begin", "hidden", "outputs", "dense", "end")


def order_of_events(overrides: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The events of a compiled block's forward and backward pass, in order: messages, waits, parts. Collective."""
    torch._dynamo.reset()
    events: list[str] = []
    parts: dict[int, str] = {}

    def compiler(graph, inputs):
        number = torch._guards.CompileContext.current_compile_id().frame_id
        if number not in parts:
            parts[number] = PARTS[len(parts)]

        def run_graph(*arguments):
            events.append(parts[number])
            return graph(*arguments)

        return make_boxed_func(run_graph)

    mesh = make_mesh(ep=dist.get_world_size(), timeout=60)
    model = build(small("model.depth=1", "model.moe_every=1", *overrides), mesh).train()
    compile_model(model, aot_autograd(fw_compiler=compiler, bw_compiler=compiler))
    config, labels_B = model.config, torch.tensor([1, 2, 10])
    for _ in range(2):  # compiled in the first pass
        x_BSD = torch.randn(3, config.tokens, config.hidden_size, requires_grad=True)
        events.clear()
        with recorded_messages(events):
            y_BSD, _ = model.blocks[0](x_BSD, torch.randn(3, config.hidden_size), labels_B, 2)
            forward = events.copy()
            events.clear()
            y_BSD.sum().backward()
    return forward, events


BACKWARD = ["end", "rows", "dense", "wait", "outputs", "rows", "hidden", "wait", "begin"]


@pytest.mark.full
def test_the_same_work_overlaps_messages_as_without_compilation():
    """See `test_dispatch.py`: counts, the way back and both all-to-alls of gradients overlap the dense experts."""
    for forward, backward in run(2, order_of_events, ()):
        sent = ["begin", "counts", "hidden", "rows", "wait", "outputs", "rows", "dense", "wait", "end"]
        assert (forward, backward) == (sent, BACKWARD)


@pytest.mark.full
def test_the_same_work_overlaps_equal_parts_as_without_compilation():
    for forward, backward in run(2, order_of_events, ("model.capacity_factor=1.0",)):
        sent = ["begin", "rows", "hidden", "wait", "outputs", "rows", "dense", "wait", "end"]
        assert (forward, backward) == (sent, BACKWARD)
