"""Initial values of parts of a rank's parameters: the same numbers as those of the whole, drawn in little memory."""

import random
from pathlib import Path

import pytest
import torch
from support.meshes import mesh_of
from support.trajectory import small

import megapromoe.nn.initial_values as module
from megapromoe.benchmark.counters import Counter
from megapromoe.config.resolve import resolve
from megapromoe.nn.dit import DiT
from megapromoe.nn.parallelize import build, initial_values, layouts
from megapromoe.planning.cost import memory_per_rank, tensors_on_rank

GIB = 2**30

LAYOUTS = [(1, 1, 1, False), (4, 2, 2, False), (4, 1, 4, False), (8, 2, 4, True)]  # the experts do not divide by 4


@pytest.mark.parametrize("world, tp, ep, expert_tp", LAYOUTS)
def test_parts_of_parameters_start_as_the_whole(world, tp, ep, expert_tp):
    config = small("model.num_experts=6", "model.depth=2")
    draw = random.Random(world + ep)
    for rank in (0, world - 1):
        mesh = mesh_of(rank, world, tp, ep, expert_tp)
        values = initial_values(config, mesh)
        for name, parameter in build(config, mesh).named_parameters():
            flat = parameter.detach().view(-1)
            edges = sorted({0, flat.numel(), *(draw.randrange(flat.numel() + 1) for _ in range(2))})
            for start, stop in zip(edges, edges[1:], strict=False):
                for dtype in (torch.float32, torch.bfloat16):
                    part = torch.full((stop - start,), torch.nan, dtype=dtype)
                    values.write(name, part, start)
                    assert torch.equal(part, flat[start:stop].to(dtype)), (name, start, stop)


def test_only_experts_that_a_part_contains_are_drawn(monkeypatch):
    drawn = []
    real = module.initial_value
    monkeypatch.setattr(module, "initial_value", lambda *arguments: drawn.append(arguments[2]) or real(*arguments))
    values = initial_values(small("model.num_experts=6"), mesh_of(0, 1, 1, 1))
    name = "blocks.1.mlp.experts.fc1.weight"
    _, *shape = values.layouts[name].shape
    expert = shape[0] * shape[1]
    values.write(name, torch.empty(expert + 2), start=2 * expert - 1)  # of experts 1, 2 and 3
    assert drawn == [torch.Size(shape)] * 3
    values.write(name, torch.empty(0), start=expert)
    values.write("blocks.0.attn.qkv.weight", torch.empty(0))
    assert len(drawn) == 3


def test_drawing_needs_memory_for_one_expert_or_one_tensor():
    config, mesh = small("model.hidden_size=64", "model.num_experts=8", "model.depth=2"), mesh_of(1, 4, 2, 2)
    with Counter() as counter:
        values = initial_values(config, mesh)
        for name, layout in values.layouts.items():
            out = torch.empty(layout.local_shape(mesh)).view(-1)
            before = counter.mark()
            values.write(name, out)
            tensor_bytes = 4 * torch.Size(layout.shape[1:] if layout.expert else layout.shape).numel()
            # Directions are normalised in a second tensor, with the lengths and their divisor.
            copies = 3 if "prototypes" in name else 1
            assert counter.peak(before) <= copies * tensor_bytes + 64, name


def test_the_document_counts_12_b_on_16_ranks():
    overrides = ("parallel.tp=2", "parallel.ep=4", "train.deepspeed=bf16_zero1")
    config = resolve(preset="promoe_t2i_12b", overrides=overrides)
    memory, (replicated, _) = memory_per_rank(config, 16), tensors_on_rank(config.model, config.layout(16))
    with torch.device("meta"):
        table = layouts(DiT(config.model)).values()
    drawn = max(torch.Size(layout.shape[1:] if layout.expert else layout.shape).numel() for layout in table)
    saved = memory.optimizer + memory.ema
    rows = {
        "parameters, bf16": f"{memory.parameters / GIB:.1f}",
        "masters and moments": f"{memory.optimizer / GIB:.1f}",
        "averages": f"{memory.ema / GIB:.1f}",
        "the largest tensor that is drawn": f"{4 * drawn / GIB:.2f}",
        "parameters that DeepSpeed has twice while it starts, those that are not experts": (
            f"{2 * sum(replicated) / GIB:.1f}"
        ),
        "written at a save, and read at a load: masters, moments, averages": f"{saved / GIB:.1f}",
        "host memory of a node of 8 for a save in background": f"{8 * saved / GIB:.0f}",
    }
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    for row, number in rows.items():
        assert f"| {row} | {number} |" in text
