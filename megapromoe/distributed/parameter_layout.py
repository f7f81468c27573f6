"""How a logical parameter is sharded over ranks, and what follows for its gradient and for the clip norm.

This is the only table of these rules. A parameter is a logical full tensor, of which each rank has a part:

=====================  =====================================  =======================  ==================
parameter              a rank holds                           gradient is summed over  then divided by
=====================  =====================================  =======================  ==================
replicated             all of it                              dp                       dp
split over tp          1/tp of one dimension                  dp                       dp
routed experts         its experts, padded to equal numbers   edp                      dp (not edp)
routed, split over tp  its experts, 1/tp of one dimension     edp                      dp (not edp)
=====================  =====================================  =======================  ==================

The divisor is always dp, because the loss is the mean over dp ranks, and the rank of an expert computes its rows of all
of them. Gradients of replicated parameters are complete and equal on the ranks of a tp group, thanks to the regions of
`nn/tensor_parallel.py`. So a norm counts each logical element once if it is weighted with 1/`replica_count`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megapromoe.config.expert_placement import ExpertPlacement
from megapromoe.distributed.mesh import Group, Mesh
from megapromoe.distributed.shard_ranges import Region, ShardRange


@dataclass(frozen=True)
class Split:
    """Splits one dimension over tp. With `blocks` > 1 it has so many equal blocks, each of which is split (q, k, v)."""

    dim: int
    blocks: int = 1


@dataclass(frozen=True)
class ParameterLayout:
    """How the logical parameter `name` with `shape` is sharded.

    Attributes:
        name: of the parameter.
        shape: of the logical tensor.
        split: over tp; None for a parameter that tp does not split.
        expert: dimension 0 is the routed experts.
        hidden_matrices: how many matrices between hidden activations are stacked in the rows (of each expert); 0 for
            parameters that are no such matrices.
        placed: of the experts of dimension 0, for one number of expert-parallel ranks; None: consecutive experts, for
            any number.
    """

    name: str
    shape: tuple[int, ...]
    split: Split | None = None
    expert: bool = False
    hidden_matrices: int = 0
    placed: ExpertPlacement | None = None

    def shard_slices(self, mesh: Mesh) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """The parts of this rank's tensor: disjoint pairs of slices, (in the local tensor, in the logical tensor).

        Spare expert slots are in no pair.
        """
        pairs = []
        for experts_of_rank, experts in self._expert_slices(mesh):
            for part_of_rank, part in self._split_slices(mesh):
                local, logical = [[slice(0, n) for n in self.shape] for _ in range(2)]
                if self.expert:
                    local[0], logical[0] = experts_of_rank, experts
                if split := self._split_over(mesh):
                    local[split.dim], logical[split.dim] = part_of_rank, part
                pairs.append((tuple(local), tuple(logical)))
        return pairs

    def _expert_slices(self, mesh: Mesh) -> Iterator[tuple[slice, slice]]:
        """Slices of dimension 0 with experts that are consecutive: (in the local tensor, in the logical tensor)."""
        if not self.expert:
            yield slice(0), slice(0)
            return
        for first, experts in _consecutive(self.placement(mesh).owned(mesh.ep.rank)):
            yield slice(first, first + len(experts)), slice(experts.start, experts.stop)

    def _split_slices(self, mesh: Mesh) -> Iterator[tuple[slice, slice]]:
        """Slices of the dimension that tp splits, for each block: (in the local tensor, in the logical tensor)."""
        split = self._split_over(mesh)
        if split is None:
            yield slice(0), slice(0)
            return
        dim, blocks, tp = split.dim, split.blocks, mesh.tp
        block, part = self.shape[dim] // blocks, self.shape[dim] // blocks // tp.size
        for b in range(blocks):
            start = b * block + tp.rank * part
            yield slice(b * part, (b + 1) * part), slice(start, start + part)

    def local_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """Shape of this rank's tensor. Raises ValueError if tp does not divide the split dimension."""
        shape = list(self.shape)
        if self.expert:
            shape[0] = self.placement(mesh).slots
        split = self._split_over(mesh)
        if split is not None:
            divisor = split.blocks * mesh.tp.size
            if shape[split.dim] % divisor:
                raise ValueError(
                    f"{self.name}: dimension {split.dim} of {self.shape} does not divide by {divisor}"
                    f" (tp {mesh.tp.size} × {split.blocks} blocks); choose another parallel.tp"
                )
            shape[split.dim] //= mesh.tp.size
        return tuple(shape)

    def placement(self, mesh: Mesh) -> ExpertPlacement:
        """Which ranks have which experts. Raises ValueError if `placed` is for another number of ranks."""
        return placement_over(mesh.ep.size, self.shape[0], self.placed)

    def local_shard(self, logical: torch.Tensor, mesh: Mesh) -> torch.Tensor:
        """This rank's part of a logical tensor, as a new tensor; spare expert slots are zero."""
        out = logical.new_zeros(self.local_shape(mesh))
        for local_slice, logical_slice in self.shard_slices(mesh):
            out[local_slice] = logical[logical_slice]
        return out

    def shard_range(self, mesh: Mesh, start: int = 0, stop: int | None = None) -> ShardRange:
        """Elements [start, stop) of this rank's flattened tensor; by default all of them."""
        shape = self.local_shape(mesh)
        pairs = tuple(
            (_region(local_slices), _region(logical_slices)) for local_slices, logical_slices in self.shard_slices(mesh)
        )
        return ShardRange(shape, pairs, start, math.prod(shape) if stop is None else stop)

    def replica_count(self, mesh: Mesh) -> int:
        """How many ranks have the same complete gradient element after the reduction over dp or edp."""
        if self.expert:
            return 1 if self.split or not mesh.expert_tp else mesh.tp.size
        return 1 if self.split else mesh.tp.size

    def gradient_group(self, mesh: Mesh) -> Group:
        """The ranks over which the gradient is summed; it is then divided by dp, see the table of the module."""
        return mesh.edp if self.expert else mesh.dp

    def _split_over(self, mesh: Mesh) -> Split | None:
        """`split` if the tp group of `mesh` splits the tensor, else None."""
        return self.split if mesh.tp.size > 1 and (mesh.expert_tp or not self.expert) else None


def placement_over(ep: int, experts: int, placed: ExpertPlacement | None) -> ExpertPlacement:
    """The placement of the experts of a layer over `ep` ranks: `placed`, or consecutive experts if it is None.

    Raises ValueError if `placed` is for another number of ranks or of experts.
    """
    if placed is None:
        return ExpertPlacement.contiguous(experts, ep)
    if (placed.ep, placed.experts) != (ep, experts):
        raise ValueError(
            f"placement of {placed.experts} experts over {placed.ep} ranks: must be of {experts} experts over {ep}"
            " ranks"
        )
    return placed


def _consecutive(experts: Sequence[int]) -> Iterator[tuple[int, range]]:
    """Takes a list of experts apart into ranges: (index of the first in the list, the experts)."""
    first = 0
    for i in range(1, len(experts) + 1):
        if i == len(experts) or experts[i] != experts[i - 1] + 1:
            yield first, range(experts[first], experts[i - 1] + 1)
            first = i


def _region(slices: tuple[slice, ...]) -> Region:
    return tuple((part.start, part.stop) for part in slices)
