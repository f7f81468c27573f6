"""Meshes of layouts, without a job."""

from megapromoe.distributed.mesh import Group, Mesh, rank_tables


def mesh_of(rank: int, world: int, tp: int, ep: int, expert_tp: bool = False, shard_ranks: int = 0) -> Mesh:
    """The mesh a rank would have, without a job."""
    groups = {}
    for direction, table in rank_tables(world, tp, ep, expert_tp, shard_ranks).items():
        row = next(tuple(int(r) for r in row) for row in table if rank in row)
        groups[direction] = Group(row, row.index(rank))
    return Mesh(**groups, expert_tp=expert_tp)
