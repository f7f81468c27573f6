"""What the host issues in a training step at the depth of XL, and that the counting is right."""

from collections import Counter as Tally

import pytest
import torch
import torch.distributed as dist
from support.processes import run

from megapromoe.benchmark.launch_program import PHASES, markdown
from megapromoe.benchmark.launches import (
    IssueCounter,
    Issued,
    count_blocks,
    count_model,
    count_step,
    count_update,
    narrow,
)
from megapromoe.benchmark.lowered import LoweringBackend
from megapromoe.benchmark.moved_bytes import UPDATE_MINIMUM, minimum_moved
from megapromoe.config.resolve import resolve
from megapromoe.distributed.mesh import UNSHARDED, make_mesh
from megapromoe.nn.dit import DiT

# ---- the counting


def test_operators_bytes_and_phases_of_a_known_program():
    a, b = torch.ones(8, 4), torch.ones(4, 2)
    with IssueCounter() as counter:
        counter.phase("products")
        c = a @ b  # its bytes are not counted
        counter.phase("elementwise")
        d = c.t().relu()  # a view is not counted
        d.add_(torch.ones(1, 1).expand(2, 8))  # two are: ones and add_; the expanded tensor has one number
    assert counter.phases["products"] == Issued(Tally(mm=1))
    assert counter.phases["elementwise"] == Issued(Tally(relu=1, ones=1, add_=1), moved=4 * (16 + 16 + 1 + 17 + 16))


@pytest.mark.full
def test_launches_of_a_known_compiled_program():
    """A product, and one kernel for all that is elementwise; each call counts."""

    def program(x, w):
        return (x @ w).sigmoid() * 2 + 1

    backend = LoweringBackend(unknown_size=1)
    compiled = torch.compile(program, backend=backend, fullgraph=True)
    x, w = torch.ones(8, 4), torch.ones(4, 16)
    for _ in range(2):
        with IssueCounter(backend) as counter:
            counter.phase("compiled")
            y = compiled(x, w)
            counter.phase("eager")
            z = y + 1
    torch.testing.assert_close(z, program(x, w) + 1)
    assert counter.phases["compiled"] == Issued(Tally(mm=1), fused=1, moved=2 * 8 * 16 * 4)
    assert counter.phases["eager"] == Issued(Tally(add=1), moved=2 * 8 * 16 * 4)
    assert backend.issued.total == 4 and len(backend.graphs) == 1


def test_the_tables():
    figures = {"launches": 1234, "operators": {}, "fused": 0, "moved": 180, "messages": 2}
    step = {"model": "promoe_s", "ranks": 1, "mode": "eager", "parameters": 10}
    blocks = {"compiled": {"dense": {"forward": 20.0, "backward": 40.04, "minimum": 48.0}}}
    facts = {"images": 8, "torch": "2.13.0", "deepspeed": "0.19.8"}
    counted = {
        "phases": dict.fromkeys(PHASES, figures),
        "fused_update": dict.fromkeys(PHASES, figures | {"moved": 100}),
    }
    lines = markdown({"steps": [{**step, **counted}], "blocks": blocks, **facts})
    rows = [line for line in lines.splitlines() if line.startswith(("| promoe_s", "| dense"))]
    assert rows == [
        f"| promoe_s | 1 | eager | {'1,234 | ' * 8}16 |",
        "| dense | compiled | 20.0 | 40.0 | 48.0 | 1.25 |",
        "| promoe_s | torch | 3702 | 18.0 | 18.0 | 18.0 | 54.0 | 36 | 1.50 |",
        "| promoe_s | fused | 3702 | 10.0 | 10.0 | 10.0 | 30.0 | 36 | 0.83 |",
    ]


# ---- what a step issues


def steps(names: tuple[str, ...]) -> list[dict[str, Issued]]:
    mesh = make_mesh(timeout=120)
    return [count_step(narrow(name, "train.global_batch=8"), mesh) for name in names]


# Forward, loss, backward of the model; what DeepSpeed's engine adds to forward and backward; norm, update, averages.
# The gradient of each parameter is copied.
EAGER = {"promoe_xl": (1099, 9, 1978, 1, 421, 23, 23, 3), "dit_xl": (529, 7, 1264, 1, 295, 23, 16, 2)}


@pytest.mark.full
def test_launches_and_bytes_of_an_eager_step():
    """torch's update moves 1.6 times what it must: DeepSpeed casts and copies; the averages are a pass apart."""
    for name, phases in zip(EAGER, run(1, steps, tuple(EAGER))[0], strict=True):
        assert tuple(issued.launches for issued in phases.values()) == EAGER[name]
        parameters = sum(p.numel() for p in DiT(narrow(name).model).parameters())
        moved = sum(phases[phase].moved for phase in ("norm", "update", "ema")) / parameters
        assert sum(UPDATE_MINIMUM.values()) == 36 and 57.5 < moved < 58.5


def fused_update(file: str) -> dict[str, Issued]:
    config = narrow("promoe_s", "train.global_batch=8", "train.adamw_backend=fused", f"train.deepspeed={file}")
    return count_update(config, make_mesh(timeout=120))


@pytest.mark.full
@pytest.mark.parametrize("file", ["bf16_zero1", "bf16_zero2", "bf16_zero3"])
def test_a_fused_update_moves_little_more_than_it_must(file):
    """In two passes: one reads the gradients for their norm, one does all the rest. 1.06 times the minimum."""
    norm, update, ema = run(1, fused_update, file)[0].values()
    parameters = sum(p.numel() for p in DiT(narrow("promoe_s").model).parameters())
    minimum = sum(UPDATE_MINIMUM.values())
    assert norm.operators["_foreach_norm"] == 1 and 2 < norm.moved / parameters < 2.05
    # For experts and for the rest a kernel for the scalars, one for the weights, and one for less than 64 of them.
    assert not update.operators and 4 <= update.fused <= 6
    assert minimum <= update.moved / parameters < minimum + 0.01
    assert ema == Issued()
    assert (norm.moved + update.moved) / parameters < 1.07 * minimum


# Forward, loss, backward of the model.
COMPILED = {"promoe_xl": (449, 9, 687), "dit_xl": (278, 7, 528)}


@pytest.mark.full
def test_launches_of_a_compiled_model():
    """Two blocks are one graph: with embedding, final layer and losses four of ProMoE, and their backward."""
    for name, expected in COMPILED.items():
        backend = LoweringBackend(unknown_size=7)
        phases = count_model(narrow(name), UNSHARDED, backend)
        assert tuple(issued.launches for issued in phases.values()) == expected
        assert len(backend.graphs) == (8 if name == "promoe_xl" else 6)


def parts(name: str) -> tuple[dict[str, Issued], int]:
    """What a model with experts on two ranks issues, and how many graphs it has; compiled on rank 0. Collective."""
    mesh = make_mesh(ep=dist.get_world_size(), timeout=120)
    backend = None if mesh.rank else LoweringBackend(unknown_size=7)
    phases = count_model(narrow(name, "parallel.ep=2"), mesh, backend)
    return phases, len(backend.graphs) if backend else 0


# Forward, loss, backward of the model; messages of forward and backward.
PARTS = (255, 9, 384), (19, 13)


@pytest.mark.full
def test_launches_of_a_model_in_parts():
    """With expert parallelism: five graphs of an MoE block, the other four, and their backward."""
    phases, graphs = run(2, parts, "promoe_s")[0]
    launches = tuple(issued.launches for issued in phases.values())
    assert (launches, tuple(phases[name].messages for name in ("forward", "backward"))) == PARTS
    assert graphs == 18


@pytest.mark.full
def test_elementwise_operators_of_a_block_move_little_more_than_they_must():
    """Compiled at most 1.3 times the minimum; most of the rest is read again to sum gradients.

    Eager: 2.1 times in a dense and 2.8 times in an MoE block.
    """
    for compiled, limits in ((False, (2.15, 2.85)), (True, (1.3, 1.3))):
        for figures, limit in zip(count_blocks(compiled).values(), limits, strict=True):
            over = (figures["forward"] + figures["backward"]) / figures["minimum"]
            assert 1 < over <= limit


def test_the_minimum_of_a_block():
    """By hand, per token: a dense block 17 forward and 31 backward; an MoE block that routes all, 22 and 34."""
    model = resolve("promoe_s", overrides=["data.source=synthetic"]).model
    for block, expected in (("dense", (17, 31)), ("moe", (22, 34))):
        groups = minimum_moved(model, block, routed=1.0).values()
        assert tuple(map(sum, zip(*groups, strict=True))) == expected
