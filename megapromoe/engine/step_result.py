"""What an optimizer step did, on the device at once and on the host when it looks."""

from __future__ import annotations

import math
from functools import cached_property

from torch import Tensor

from megapromoe.distributed.host_copy import OnTheWay


class StepResult:
    """What a step did, the same on every rank. The host waits for the step's norm when it first looks at any of it."""

    def __init__(self, squares_and_votes: Tensor, largest: float):
        """Args: the sum of squares of the whole gradient and the number of ranks that ask to stop, (2,) float64;
        the largest norm that is not a spike."""
        self._there, self._here = squares_and_votes, OnTheWay(squares_and_votes)
        self._largest = largest

    @cached_property
    def norm_there(self) -> Tensor:
        """`norm`, on the device."""
        return self._there[0].sqrt()

    @cached_property
    def applied_there(self) -> Tensor:
        """`applied`, on the device."""
        return self.norm_there.isfinite() & (self.norm_there <= self._largest)

    @cached_property
    def _seen(self) -> tuple[float, float]:
        total, votes = self._here.on_host()
        return math.sqrt(total), votes

    @property
    def norm(self) -> float:
        """Of the whole gradient before clipping."""
        return self._seen[0]

    @property
    def applied(self) -> bool:
        """False where the norm was not finite, or too large: then nothing changed."""
        return math.isfinite(self.norm) and self.norm <= self._largest

    @property
    def stop(self) -> bool:
        """Did any rank ask to stop?"""
        return self._seen[1] > 0
