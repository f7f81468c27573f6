"""The result of an optimizer step: available on the device at once, on the host when it is first read."""

from __future__ import annotations

import math
from functools import cached_property

from torch import Tensor

from megapromoe.distributed.host_copy import OnTheWay


class StepResult:
    """What a step did, the same on every rank. The first read of `norm`, `applied` or `stop` waits for the device."""

    def __init__(self, squares_and_votes: Tensor, largest: float):
        """Args: the sum of squares of the whole gradient and the number of ranks that ask to stop, (2,) float64;
        the largest norm that is not a spike."""
        self._on_device, self._copy = squares_and_votes, OnTheWay(squares_and_votes)
        self._largest = largest

    @cached_property
    def norm_on_device(self) -> Tensor:
        """`norm`, on the device."""
        return self._on_device[0].sqrt()

    @cached_property
    def applied_on_device(self) -> Tensor:
        """`applied`, on the device."""
        return self.norm_on_device.isfinite() & (self.norm_on_device <= self._largest)

    @cached_property
    def _norm_and_votes(self) -> tuple[float, float]:
        total, votes = self._copy.on_host()
        return math.sqrt(total), votes

    @property
    def norm(self) -> float:
        """Of the whole gradient before clipping."""
        return self._norm_and_votes[0]

    @property
    def applied(self) -> bool:
        """False where the norm was not finite, or too large: then nothing changed."""
        return math.isfinite(self.norm) and self.norm <= self._largest

    @property
    def stop(self) -> bool:
        """Whether any rank asked to stop."""
        return self._norm_and_votes[1] > 0
