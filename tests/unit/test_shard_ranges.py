"""Ranges of shards: every copy between two layouts is the one that goes through the logical tensor."""

import random
from itertools import product

import pytest
import torch
from support.meshes import mesh_of

from megapromoe.distributed.parameter_layout import ParameterLayout, Split
from megapromoe.distributed.shard_ranges import ShardRange, copy_range


def layouts_of(shape: tuple[int, ...], experts: bool) -> list[ParameterLayout]:
    splits = [None, *(Split(dim) for dim in range(int(experts), len(shape)))]
    if not experts and shape and shape[0] % 12 == 0:
        splits.append(Split(0, blocks=3))
    return [ParameterLayout("x", shape, split, expert=experts) for split in splits]


@pytest.mark.parametrize(
    "shape, experts", [((), False), ((8,), False), ((24, 4), False), ((12, 4, 8), False), ((5, 4, 8), True)]
)
def test_any_range_is_copied_from_ranges_of_any_layout(shape, experts):
    logical = 1 + torch.arange(float(torch.Size(shape).numel())).view(shape)
    draw = random.Random(0)
    worlds = [(4, 1, 1), (4, 2, 2), (4, 1, 4), (8, 4, 2)]
    for (source_layout, target_layout), source_world, target_world in product(
        product(layouts_of(shape, experts), repeat=2), worlds, worlds
    ):
        world, tp, ep = target_world
        mesh = mesh_of(draw.randrange(world), world, tp, ep, expert_tp=tp > 1)
        expected = target_layout.local_shard(logical, mesh).view(-1)
        start, stop = sorted(draw.randrange(expected.numel() + 1) for _ in range(2))
        out = torch.full((stop - start,), torch.nan)
        target = target_layout.shard_range(mesh, start, stop)
        if target.has_padding:
            out.zero_()
        world, tp, ep = source_world
        for rank in range(world):
            mesh = mesh_of(rank, world, tp, ep, expert_tp=tp > 1)
            flat = source_layout.local_shard(logical, mesh).view(-1)
            edges = sorted({0, flat.numel(), *(draw.randrange(flat.numel() + 1) for _ in range(3))})
            for first, last in zip(edges, edges[1:], strict=False):  # the partitions of a ZeRO stage
                source = source_layout.shard_range(mesh, first, last)
                copy_range(target, out, source, flat[first:last])
        assert torch.equal(out, expected[start:stop]), (source_layout, target_layout, source_world, target_world)


def test_the_boxes_of_a_range_are_few_and_have_each_element_once():
    shape = (3, 4, 5)
    for start in range(61):
        for stop in range(start, 61):
            counted = torch.zeros(shape, dtype=torch.int64)
            boxes = ShardRange(shape, ShardRange.of_tensor(shape).pairs, start, stop).boxes
            for box in boxes:
                counted[tuple(slice(*span) for span in box.region)] += 1
            assert counted.view(-1).tolist() == [int(start <= i < stop) for i in range(60)]
            assert len(boxes) <= 2 * len(shape) - 1


def test_an_empty_tensor_has_no_boxes():
    assert ShardRange.of_tensor((3, 0)).boxes == () and not ShardRange.of_tensor((3, 0)).has_padding
