"""The process groups of a run, as one value.

Ranks are laid out so that the most talkative neighbours are closest: tensor parallelism varies fastest, expert
parallelism next, so both stay inside a node whenever they fit::

    data × tensor      arange(world).reshape(dp, tp)
    expert             arange(world).reshape(edp, ep, etp)        etp = tp if experts are split over tp, else 1
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """Some ranks that talk to each other.

    `handle` is the torch process group, or None for a group of one in a run without torch.distributed.
    """

    ranks: tuple[int, ...]
    rank: int
    handle: dist.ProcessGroup | None = field(default=None, compare=False)

    @property
    def size(self) -> int:
        return len(self.ranks)


SINGLE_RANK = Group((0,), 0)


@dataclass(frozen=True)
class Mesh:
    """Where one rank stands: its groups in every direction of the layout.

    `tp` shares the matrices of a layer, `dp` holds the same matrices for other samples, `ep` holds the other
    experts, `edp` holds the same experts for other tokens, `whole` is everyone.
    """

    whole: Group
    tp: Group
    dp: Group
    ep: Group
    edp: Group
    expert_tp: bool = False

    @property
    def rank(self) -> int:
        return self.whole.rank

    @property
    def world(self) -> int:
        return self.whole.size

    @property
    def etp(self) -> int:
        """Over how many ranks each expert's width is split."""
        return self.tp.size if self.expert_tp else 1


UNSHARDED = Mesh(SINGLE_RANK, SINGLE_RANK, SINGLE_RANK, SINGLE_RANK, SINGLE_RANK)  # the whole model on one rank


def rank_tables(world: int, tp: int, ep: int, expert_tp: bool) -> dict[str, np.ndarray]:
    """The ranks of every group of a layout: direction -> integer table (groups, members).

    Raises ValueError if the sizes do not divide; `config.resolve` reports the same for users.
    """
    etp = tp if expert_tp else 1
    if world % tp or world % (ep * etp):
        raise ValueError(f"world {world} does not divide into tp {tp} and ep {ep} × expert tp {etp}")
    dense = np.arange(world).reshape(world // tp, tp)
    expert = np.arange(world).reshape(world // (ep * etp), ep, etp)
    return {
        "whole": np.arange(world)[None],
        "tp": dense,
        "dp": dense.T,
        "ep": expert.transpose(0, 2, 1).reshape(-1, ep),
        "edp": expert.transpose(1, 2, 0).reshape(ep * etp, -1),
    }


def make_mesh(tp: int = 1, ep: int = 1, expert_tp: bool = False, timeout: float = 600.0) -> Mesh:
    """Creates the groups of the running torch.distributed job, or a mesh of one without it.

    Every group gets the time-out (seconds): a hang in any direction ends. Collective: all ranks call it.
    """
    if not dist.is_initialized():
        return UNSHARDED
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = {}
    for direction, table in rank_tables(world, tp, ep, expert_tp).items():
        for row in table:
            ranks = tuple(int(r) for r in row)
            handle = dist.new_group(ranks, timeout=timedelta(seconds=timeout))
            if rank in ranks:
                mine[direction] = Group(ranks, ranks.index(rank), handle)
    return Mesh(**mine, expert_tp=expert_tp)
