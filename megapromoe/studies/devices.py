"""The GPUs of this machine, divided among the jobs that one `study run` runs at the same time.

Without this, jobs that run at the same time would all use the first GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from megapromoe.studies.placement import Placement


class Devices:
    """GPUs that no job uses. Without GPUs, only the number of jobs is limited.

    Args:
        gpus: names of GPUs as in CUDA_VISIBLE_DEVICES.
    """

    def __init__(self, gpus: Sequence[str] = ()):
        self._free, self._count = list(gpus), len(gpus)

    def take(self, placement: Placement) -> tuple[str, ...] | None:
        """The GPUs for a job, one for each rank; None if so many are not free now.

        Empty for a job whose ranks do not run on this machine, and without GPUs. A job with more ranks than the machine
        has GPUs gets all of them.
        """
        if not self._count or not placement.is_local:
            return ()
        wanted = min(placement.ranks, self._count)
        if wanted > len(self._free):
            return None
        taken, self._free = self._free[:wanted], self._free[wanted:]
        return tuple(taken)

    def give_back(self, gpus: Sequence[str]) -> None:
        """Returns the GPUs of a job that has ended."""
        self._free = [*self._free, *gpus]
