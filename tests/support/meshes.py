"""Meshes of layouts, without a job and in one."""

from collections.abc import Callable
from functools import cache

from megapromoe.config.options import Config
from megapromoe.distributed.mesh import Group, Mesh, make_mesh, rank_tables


def meshes_made_once() -> Callable[[Config], Mesh]:
    """A function from configs to their meshes in the running job, for many models in turn. Collective.

    Process groups stay until the job ends, and the threads of gloo in each take processor time even without messages.
    """
    make = cache(lambda tp, ep, expert_tp, shard_ranks: make_mesh(tp, ep, expert_tp, 60, shard_ranks))
    return lambda config: make(*(getattr(config.parallel, name) for name in ("tp", "ep", "expert_tp", "shard_ranks")))


def mesh_of(rank: int, world: int, tp: int, ep: int, expert_tp: bool = False, shard_ranks: int = 0) -> Mesh:
    """The mesh a rank would have, without a job."""
    groups = {}
    for direction, table in rank_tables(world, tp, ep, expert_tp, shard_ranks).items():
        row = next(tuple(int(r) for r in row) for row in table if rank in row)
        groups[direction] = Group(row, row.index(rank))
    return Mesh(**groups, expert_tp=expert_tp)
