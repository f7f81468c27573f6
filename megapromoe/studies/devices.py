"""The GPUs of this machine, divided among the jobs that one `study run` runs at the same time.

Without this, jobs that run at the same time would all use the first GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from megapromoe.studies.placement import Placement


class Devices:
    """The GPUs of a command, and how many of its jobs use each. Without GPUs, only the number of jobs is limited.

    If there are to be more jobs than GPUs, jobs share them: `jobs` jobs of one rank always run at the same time. Ranks
    of one job never share a GPU, unless the job has more ranks than there are GPUs.

    Args:
        gpus: names of GPUs as in CUDA_VISIBLE_DEVICES.
        jobs: number of jobs that may run at the same time.
    """

    def __init__(self, gpus: Sequence[str] = (), jobs: int = 1):
        self._jobs_on = dict.fromkeys(gpus, 0)
        self._most = -(-jobs // len(self._jobs_on)) if self._jobs_on else 0

    def take(self, placement: Placement) -> tuple[str, ...] | None:
        """The least used GPUs for a job, one for each rank; None if so many are not free now.

        Empty for a job whose ranks do not run on this machine, and without GPUs. A job with more ranks than the machine
        has GPUs gets all of them.
        """
        if not self._jobs_on or not placement.is_local:
            return ()
        wanted = min(placement.ranks, len(self._jobs_on))
        free = sorted((gpu for gpu, jobs in self._jobs_on.items() if jobs < self._most), key=self._jobs_on.__getitem__)
        if wanted > len(free):
            return None
        taken = tuple(free[:wanted])
        for gpu in taken:
            self._jobs_on[gpu] += 1
        return taken

    def give_back(self, gpus: Sequence[str]) -> None:
        """Returns the GPUs of a job that has ended."""
        for gpu in gpus:
            self._jobs_on[gpu] -= 1
