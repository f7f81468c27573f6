"""Copies between ranges of differently sharded tensors, without assembling the logical tensor.

A `ShardRange` is a contiguous range of a flattened shard, such as the part of a parameter that one ZeRO partition has.
`copy_range` copies those logical elements that two ranges have in common. It takes the ranges apart into boxes: a box
is a rectangular part of the logical tensor whose elements are at regular distances in the flat range. The common part
of two boxes is a box again, and one strided copy moves it. So nothing is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

Region = tuple[tuple[int, int], ...]
"""[start, stop) in each dimension."""


@dataclass(frozen=True)
class Box:
    """A rectangular part of a logical tensor, and where a flat range has it.

    Attributes:
        region: in the logical tensor; not empty.
        offset: of its first element in the flat range.
        strides: distances in the flat range between neighbours in each dimension.
    """

    region: Region
    offset: int
    strides: tuple[int, ...]

    def part(self, flat: Tensor, region: Region) -> Tensor:
        """A view of the elements of `region`, a part of the region of this box, in its flat range."""
        inner = zip(region, self.region, self.strides, strict=True)
        offset = self.offset + sum((start - first) * stride for (start, _), (first, _), stride in inner)
        sizes = tuple(stop - start for start, stop in region)
        return flat.as_strided(sizes, self.strides, flat.storage_offset() + offset)


@dataclass(frozen=True)
class ShardRange:
    """Elements [start, stop) of a flattened shard.

    Attributes:
        shape: of the shard.
        pairs: equal regions of the shard and of the logical tensor, disjoint; elements in no pair are padding.
        start, stop: the range.
    """

    shape: tuple[int, ...]
    pairs: tuple[tuple[Region, Region], ...]
    start: int
    stop: int

    @classmethod
    def of_tensor(cls, shape: tuple[int, ...]) -> ShardRange:
        """All elements of an unsharded tensor."""
        region = tuple((0, n) for n in shape)
        return cls(shape, ((region, region),), 0, math.prod(shape))

    @property
    def has_padding(self) -> bool:
        """Whether some elements of the range are in no logical tensor."""
        return sum(map(_volume, (box.region for box in self.boxes))) < self.stop - self.start

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """The boxes that the range consists of."""
        strides = tuple(math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))
        boxes = []
        for box in _boxes(self.shape, self.start, self.stop):
            for local, logical in self.pairs:
                region = _common(box, local)
                if region is None:
                    continue
                offset = sum(first * stride for (first, _), stride in zip(region, strides, strict=True)) - self.start
                moved = tuple(
                    (start - a + b, stop - a + b)
                    for (start, stop), (a, _), (b, _) in zip(region, local, logical, strict=True)
                )
                boxes.append(Box(moved, offset, strides))
        return tuple(boxes)

    def overlaps(self, region: Region) -> bool:
        """Whether the range has elements of a region of the logical tensor."""
        return any(_common(box.region, region) is not None for box in self.boxes)


def copy_range(target: ShardRange, out: Tensor, source: ShardRange, values: Tensor) -> None:
    """Copies the logical elements that both ranges have; all others of `out` stay as they are.

    Args:
        target, source: ranges of shards of the same logical tensor.
        out: flat, contiguous, (target.stop - target.start,).
        values: flat, contiguous, (source.stop - source.start,); of any type and device.
    """
    for to in target.boxes:
        for of in source.boxes:
            region = _common(to.region, of.region)
            if region is not None:
                to.part(out, region).copy_(of.part(values, region))


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Region]:
    """Takes a range of a flattened tensor apart into at most 2·dim - 1 rectangular parts, in order."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    size = math.prod(shape[1:])
    first, last = -(-start // size), stop // size  # whole rows [first, last)
    if first > last:  # within one row
        yield from _in_row(shape, last, start - last * size, stop - last * size)
        return
    if start < first * size:
        yield from _in_row(shape, first - 1, start - (first - 1) * size, size)
    if first < last:
        yield ((first, last), *((0, n) for n in shape[1:]))
    if last * size < stop:
        yield from _in_row(shape, last, 0, stop - last * size)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Region]:
    for box in _boxes(shape[1:], start, stop):
        yield ((row, row + 1), *box)


def _common(a: Region, b: Region) -> Region | None:
    """The common part of two regions; None if it is empty."""
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return None if any(start >= stop for start, stop in common) else common


def _volume(region: Region) -> int:
    return math.prod(stop - start for start, stop in region)
