"""How a logical parameter is sliced over ranks, and what that means for its gradient and for the clip norm.

The one gradient rule table. A parameter has a logical full tensor; each rank holds a view of it:

=====================  =====================================  =======================  ==================
parameter              a rank holds                           gradient is summed over  then divided by
=====================  =====================================  =======================  ==================
replicated             all of it                              dp                       dp
split over tp          1/tp of one dimension                  dp                       dp
routed experts         its experts (padded to ceil(E/ep))     edp                      dp (not edp)
routed, split over tp  its experts, 1/tp of one dimension     edp                      dp (not edp)
=====================  =====================================  =======================  ==================

The divisor is always dp: the loss is the mean over dp ranks, and an expert's rows from all of them meet on its owner.
Gradients of replicated parameters are complete and identical on the ranks of a tp group (the regions in
`nn/tensor_parallel.py` see to it), so a norm counts each logical element once by weighting it with 1/`replicas`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from megapromoe.distributed.mesh import Group, Mesh


@dataclass(frozen=True)
class ExpertPlacement:
    """Which rank of an ep group owns which of E experts: consecutive, as even as can be.

    E need not divide: the first E % ep ranks own one expert more. Every rank stores `slots` = ceil(E/ep) experts so
    that all ranks run the same collectives on the same shapes; a spare slot is zero, gets no token and no gradient.
    """

    experts: int
    ep: int

    @property
    def slots(self) -> int:
        return -(-self.experts // self.ep)

    def owned(self, rank: int) -> range:
        """The logical experts of the ep group's rank."""
        base, extra = divmod(self.experts, self.ep)
        start = rank * base + min(rank, extra)
        return range(start, start + base + (rank < extra))

    def slot_E(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Global slot (rank·slots + place) of each logical expert, int64 (E,). Copied to a device once."""
        return _slots(self, torch.device(device))

    def slot_of(self, expert_R: torch.Tensor) -> torch.Tensor:
        """Global slots of logical experts (int64): the same numbers, unless there are spare slots."""
        return expert_R if self.experts == self.ep * self.slots else self.slot_E(expert_R.device)[expert_R]


@cache
def _slots(placement: ExpertPlacement, device: torch.device) -> torch.Tensor:
    slots = [r * placement.slots + i for r in range(placement.ep) for i in range(len(placement.owned(r)))]
    return torch.tensor(slots, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Split:
    """Slicing of one dimension over tp. `blocks` > 1: it is that many equal blocks, each sliced (q, k, v)."""

    dim: int
    blocks: int = 1


@dataclass(frozen=True)
class ParameterLayout:
    """How the logical parameter `name` of `shape` lives on the ranks.

    `split` says what tp slices (None: nothing); `expert` says that dimension 0 is the routed experts.
    """

    name: str
    shape: tuple[int, ...]
    split: Split | None = None
    expert: bool = False

    def pieces(self, mesh: Mesh) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Where this rank's tensor lies in the logical one: pairs (local region, logical region), disjoint.

        Slots without an expert appear in no pair.
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
            here, there = list(local), list(logical)
            here[dim] = slice(b * part, (b + 1) * part)
            start = b * block + tp.rank * part
            there[dim] = slice(start, start + part)
            pairs.append((tuple(here), tuple(there)))
        return pairs

    def local_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """Shape of this rank's tensor. Raises ValueError if tp does not divide the split dimension."""
        shape = list(self.shape)
        if self.expert:
            shape[0] = self.placement(mesh).slots
        split = self._split_over(mesh)
        if split is not None:
            ways = split.blocks * mesh.tp.size
            if shape[split.dim] % ways:
                raise ValueError(
                    f"{self.name}: dimension {split.dim} of {self.shape} does not divide by {ways}"
                    f" (tp {mesh.tp.size} × {split.blocks} blocks); choose another parallel.tp"
                )
            shape[split.dim] //= mesh.tp.size
        return tuple(shape)

    def placement(self, mesh: Mesh) -> ExpertPlacement:
        return ExpertPlacement(self.shape[0], mesh.ep.size)

    def take(self, logical: torch.Tensor, mesh: Mesh) -> torch.Tensor:
        """This rank's view of a logical tensor, as a new tensor; spare expert slots are zero."""
        out = logical.new_zeros(self.local_shape(mesh))
        for here, there in self.pieces(mesh):
            out[here] = logical[there]
        return out

    def replicas(self, mesh: Mesh) -> int:
        """How many ranks hold the same complete gradient element after the reduction over dp or edp."""
        if self.expert:
            return 1 if self.split or not mesh.expert_tp else mesh.tp.size
        return 1 if self.split else mesh.tp.size

    def gradient_group(self, mesh: Mesh) -> Group:
        """The ranks over which the gradient is summed (then divided by dp, see the table above)."""
        return mesh.edp if self.expert else mesh.dp

    def _split_over(self, mesh: Mesh) -> Split | None:
        """What the tp group of `mesh` slices, or None if every rank holds the tensor unsliced."""
        return self.split if mesh.tp.size > 1 and (mesh.expert_tp or not self.expert) else None
