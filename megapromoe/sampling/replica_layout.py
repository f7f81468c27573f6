"""Which rank generates which chunk of images.

A *replica* is a rank, or the tp ranks that hold one model together. Under expert parallelism the replicas of an
*expert-parallel group* share experts, so they generate in step. The chunks of a group are neighbours, always the same
ones: its images have the same bits at any number of groups. A replica without a chunk generates one again, so that the
others have its experts, and drops it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ReplicaLayout:
    """The place of this rank among the replicas.

    Attributes:
        replica: this rank's replica within its expert-parallel group.
        group_size: replicas of a group.
        group: this rank's group.
        num_groups: groups of the job.
        is_first: whether this rank is the first of its replica, which writes the images.
    """

    replica: int
    group_size: int
    group: int
    num_groups: int
    is_first: bool

    @classmethod
    def of(cls, rank: int, world: int, tp: int = 1, ep: int = 1, etp: int = 1) -> ReplicaLayout:
        """The place of a rank; `etp` is the number of ranks over which each expert's width is split."""
        size = math.lcm(tp, ep * etp)
        group, place = divmod(rank, size)
        return cls(place // tp, size // tp, group, world // size, place % tp == 0)

    def rounds(self, missing: list[int], last: int) -> Iterator[tuple[int | None, list[int]]]:
        """Each round: the chunk this rank generates (None: none), and the missing ones of all ranks.

        Every rank gets as many rounds, and every replica of a group a chunk in the same ones.

        Args:
            missing: chunks to generate.
            last: the last chunk of all, which a replica generates where its own would lie beyond.
        """
        wanted = set(missing)
        units = sorted({chunk // self.group_size for chunk in missing})
        for start in range(0, len(units), self.num_groups):
            now = units[start : start + self.num_groups]
            chunks = [c for u in now for c in range(u * self.group_size, (u + 1) * self.group_size) if c in wanted]
            takes_part = self.group < len(now)
            yield min(now[self.group] * self.group_size + self.replica, last) if takes_part else None, chunks

    def writes(self, chunk: int) -> bool:
        """Whether this rank is the one to write the chunk that it generates."""
        return self.is_first and chunk % self.group_size == self.replica
