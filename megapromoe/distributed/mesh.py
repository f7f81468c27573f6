"""The process groups of a run.

Tensor parallelism varies fastest over ranks and expert parallelism next, so that the groups that communicate most are
within a node if they fit::

    data × tensor      arange(world).reshape(dp, tp)
    expert             arange(world).reshape(edp, ep, etp)        etp = tp if experts are split over tp, else 1

Where ZeRO divides optimizer states over some consecutive ranks alone, such as those of a node, the ranks of dp and of
edp are two directions each: shards, which are consecutive in the group, and replicas, which have the same shard.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Self

import numpy as np
import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """Ranks that communicate with each other.

    Attributes:
        ranks: global ranks of the members.
        rank: this rank's position in `ranks`.
        process_group: of torch.distributed; None for a group of one rank without a job.
    """

    ranks: tuple[int, ...]
    rank: int
    process_group: dist.ProcessGroup | None = field(default=None, compare=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def __deepcopy__(self, memo: dict) -> Self:
        """The same group: a copy of a model communicates with the same ranks."""
        return self


SINGLE_RANK = Group((0,), 0)


@dataclass(frozen=True)
class Mesh:
    """The groups of one rank, in every direction of the layout.

    Attributes:
        world: all ranks.
        tp: tensor parallel: ranks that share the matrices of a layer.
        dp: data parallel: ranks that have the same matrices and other samples.
        ep: expert parallel: ranks that have other experts.
        edp: expert data parallel: ranks that have the same experts and other tokens.
        expert_tp: experts are split over `tp` too.
        dp_shard, edp_shard: the ranks of dp and edp over which ZeRO stages 1 and 2 divide optimizer states; None: all.
        dp_replicas, edp_replicas: the ranks of dp and edp that then have the same shard.
    """

    world: Group
    tp: Group
    dp: Group
    ep: Group
    edp: Group
    expert_tp: bool = False
    dp_shard: Group | None = None
    dp_replicas: Group = SINGLE_RANK
    edp_shard: Group | None = None
    edp_replicas: Group = SINGLE_RANK

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def world_size(self) -> int:
        return self.world.size

    @property
    def etp(self) -> int:
        """Number of ranks over which each expert is split (ETP)."""
        return self.tp.size if self.expert_tp else 1

    @property
    def directions(self) -> dict[str, Group]:
        """The groups by name."""
        groups = {name: getattr(self, name) for name in ("world", "tp", "dp", "ep", "edp")}
        if self.dp_shard is None or self.edp_shard is None:
            return groups
        return groups | {name: getattr(self, name) for name in SHARD_DIRECTIONS}

    def shard_group(self, expert: bool) -> Group:
        """The ranks over which ZeRO divides optimizer states: of routed experts, or of all other parameters."""
        return (self.edp_shard or self.edp) if expert else (self.dp_shard or self.dp)

    def replica_group(self, expert: bool) -> Group:
        """The ranks that have the same shard of optimizer states as this rank, at ZeRO stages 1 and 2."""
        return self.edp_replicas if expert else self.dp_replicas


SHARD_DIRECTIONS = ("dp_shard", "dp_replicas", "edp_shard", "edp_replicas")
UNSHARDED = Mesh(SINGLE_RANK, SINGLE_RANK, SINGLE_RANK, SINGLE_RANK, SINGLE_RANK)  # the whole model on one rank


def rank_tables(world: int, tp: int, ep: int, expert_tp: bool, shard_ranks: int = 0) -> dict[str, np.ndarray]:
    """The ranks of every group of a layout: direction -> integers (groups, members).

    With `shard_ranks`, the consecutive ranks over which ZeRO divides optimizer states, also `SHARD_DIRECTIONS`.

    Raises ValueError if the sizes do not divide; `config.resolve` checks that for users.
    """
    etp = tp if expert_tp else 1
    if world % tp or world % (ep * etp):
        raise ValueError(f"world {world} does not divide into tp {tp} and ep {ep} × expert tp {etp}")
    dense = np.arange(world).reshape(world // tp, tp)
    expert = np.arange(world).reshape(world // (ep * etp), ep, etp)
    tables = {
        "world": np.arange(world)[None],
        "tp": dense,
        "dp": dense.T,
        "ep": expert.transpose(0, 2, 1).reshape(-1, ep),
        "edp": expert.transpose(1, 2, 0).reshape(ep * etp, -1),
    }
    if not shard_ranks:
        return tables
    for direction, stride in (("dp", tp), ("edp", ep * etp)):
        if world % shard_ranks or (shard_ranks % stride and shard_ranks > stride):
            raise ValueError(f"shards of {shard_ranks} ranks do not divide {world} ranks, {direction} {stride} apart")
        shards = tables[direction].reshape(stride, -1, max(shard_ranks // stride, 1))
        tables[f"{direction}_shard"] = shards.reshape(-1, shards.shape[2])
        tables[f"{direction}_replicas"] = shards.transpose(0, 2, 1).reshape(-1, shards.shape[1])
    return tables


def make_mesh(tp: int = 1, ep: int = 1, expert_tp: bool = False, timeout: float = 600.0, shard_ranks: int = 0) -> Mesh:
    """Creates the groups of the running torch.distributed job; without a job, a mesh of one rank. Collective.

    Every group gets the timeout, in seconds, so that a hang in any direction ends.
    """
    if not dist.is_initialized():
        return UNSHARDED
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = {}
    for direction, table in rank_tables(world, tp, ep, expert_tp, shard_ranks).items():
        for row in table:
            ranks = tuple(int(r) for r in row)
            process_group = dist.new_group(ranks, timeout=timedelta(seconds=timeout))
            if rank in ranks:
                groups[direction] = Group(ranks, ranks.index(rank), process_group)
    return Mesh(**groups, expert_tp=expert_tp)
