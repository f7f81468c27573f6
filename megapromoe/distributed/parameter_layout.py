"""How a logical parameter is sharded over ranks, and what follows for its gradient and for the clip norm.

This is the only table of these rules. A parameter is a logical full tensor, of which each rank has a part:

=====================  =====================================  =======================  ==================
parameter              a rank holds                           gradient is summed over  then divided by
=====================  =====================================  =======================  ==================
replicated             all of it                              dp                       dp
split over tp          1/tp of one dimension                  dp                       dp
routed experts         its experts (padded to ceil(E/ep))     edp                      dp (not edp)
routed, split over tp  its experts, 1/tp of one dimension     edp                      dp (not edp)
=====================  =====================================  =======================  ==================

The divisor is always dp, because the loss is the mean over dp ranks, and the rank of an expert computes its rows of all
of them. Gradients of replicated parameters are complete and equal on the ranks of a tp group, thanks to the regions of
`nn/tensor_parallel.py`. So a norm counts each logical element once if it is weighted with 1/`replica_count`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from megapromoe.distributed.mesh import Group, Mesh
from megapromoe.distributed.shard_ranges import Region, ShardRange


@dataclass(frozen=True)
class ExpertPlacement:
    """Which of E experts each rank of an ep group has: consecutive ones, as evenly as possible.

    E need not be a multiple of ep: the first E % ep ranks have one expert more. Every rank stores `slots` = ceil(E/ep)
    experts, so that all ranks run the same collectives with the same shapes. A spare slot is zero and gets neither
    tokens nor a gradient.
    """

    experts: int
    ep: int

    @property
    def slots(self) -> int:
        return -(-self.experts // self.ep)

    def owned(self, rank: int) -> range:
        """The logical experts of a rank of the ep group."""
        base, extra = divmod(self.experts, self.ep)
        start = rank * base + min(rank, extra)
        return range(start, start + base + (rank < extra))

    def slot_E(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Global slot (rank·slots + index) of each logical expert, int64 (E,). It is copied to a device once."""
        return _slots(self, torch.device(device))

    def slot_of(self, expert_R: torch.Tensor) -> torch.Tensor:
        """Global slots of logical experts, int64: the same numbers, unless there are spare slots."""
        if self.experts == self.ep * self.slots:
            return expert_R
        if torch.compiler.is_compiling():  # a graph would copy the table to the device each time
            fewest, with_one_more = divmod(self.experts, self.ep)
            return expert_R + (expert_R - with_one_more * self.slots).clamp(min=0) // fewest
        return self.slot_E(expert_R.device)[expert_R]


@cache
def _slots(placement: ExpertPlacement, device: torch.device) -> torch.Tensor:
    slots = [r * placement.slots + i for r in range(placement.ep) for i in range(len(placement.owned(r)))]
    return torch.tensor(slots, dtype=torch.int64, device=device)


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
    """

    name: str
    shape: tuple[int, ...]
    split: Split | None = None
    expert: bool = False
    hidden_matrices: int = 0

    def shard_slices(self, mesh: Mesh) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """The parts of this rank's tensor: disjoint pairs of slices, (in the local tensor, in the logical tensor).

        Spare expert slots are in no pair.
        """
        shape = self.shape
        local, logical = [slice(0, n) for n in shape], [slice(0, n) for n in shape]
        if self.expert:
            owned = self.placement(mesh).owned(mesh.ep.rank)
            local[0], logical[0] = slice(0, len(owned)), slice(owned.start, owned.stop)
        split = self._split_over(mesh)
        if split is None:
            return [(tuple(local), tuple(logical))]
        dim, blocks, tp = split.dim, split.blocks, mesh.tp
        block, part = shape[dim] // blocks, shape[dim] // blocks // tp.size
        pairs = []
        for b in range(blocks):
            local_slice, logical_slice = list(local), list(logical)
            local_slice[dim] = slice(b * part, (b + 1) * part)
            start = b * block + tp.rank * part
            logical_slice[dim] = slice(start, start + part)
            pairs.append((tuple(local_slice), tuple(logical_slice)))
        return pairs

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
        """Which ranks have which experts."""
        return ExpertPlacement(self.shape[0], mesh.ep.size)

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


def _region(slices: tuple[slice, ...]) -> Region:
    return tuple((part.start, part.stop) for part in slices)
