"""Assigns chunks of images to ranks.

A *replica* is a rank, or the tp ranks over which one model is sharded. With expert parallelism, the replicas of an
*expert-parallel group* share experts, so they must generate at the same time. The chunks are divided into fixed units
of consecutive chunks, one for each replica of a group, and a group always generates a complete unit. So the images have
the same bits for any number of groups. A replica whose chunk is not needed generates it nevertheless, because the
others need its experts, and drops it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megapromoe.distributed.launch_environment import LaunchEnvironment


@dataclass(frozen=True)
class ReplicaLayout:
    """The position of this rank among the replicas.

    Attributes:
        replica: index of this rank's replica in its expert-parallel group.
        group_size: number of replicas in a group.
        group: index of this rank's group.
        num_groups: number of groups of the job.
        is_first: whether this is the first rank of its replica, which writes the images.
    """

    replica: int
    group_size: int
    group: int
    num_groups: int
    is_first: bool

    @classmethod
    def of(cls, rank: int, world: int, tp: int = 1, ep: int = 1, etp: int = 1) -> ReplicaLayout:
        """The position of a rank; `etp` is the number of ranks over which the width of each expert is sharded."""
        size = math.lcm(tp, ep * etp)
        group, place = divmod(rank, size)
        return cls(place // tp, size // tp, group, world // size, place % tp == 0)

    @classmethod
    def of_job(cls, launch: LaunchEnvironment, tp: int, ep: int, expert_tp: bool) -> ReplicaLayout:
        """The position of this rank of a job."""
        return cls.of(launch.rank, launch.world, tp, ep, tp if expert_tp else 1)

    def rounds(self, missing: list[int], last: int) -> Iterator[tuple[int | None, list[int]]]:
        """Yields for each round the chunk of this rank (None: it is idle) and the missing chunks of all ranks.

        All ranks have the same number of rounds, and all replicas of a group have a chunk in the same rounds.

        Args:
            missing: chunks to generate.
            last: the last chunk; a replica generates it if its own chunk number would be larger.
        """
        wanted = set(missing)
        units = sorted({chunk // self.group_size for chunk in missing})
        for start in range(0, len(units), self.num_groups):
            now = units[start : start + self.num_groups]
            chunks = [c for u in now for c in range(u * self.group_size, (u + 1) * self.group_size) if c in wanted]
            takes_part = self.group < len(now)
            yield min(now[self.group] * self.group_size + self.replica, last) if takes_part else None, chunks

    def writes(self, chunk: int) -> bool:
        """Whether this rank writes the chunk that it generated."""
        return self.is_first and chunk % self.group_size == self.replica
