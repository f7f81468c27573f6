"""The result of an optimizer step: available on the device at once, on the host when it is first read."""

from __future__ import annotations

import math
from functools import cached_property

from torch import Tensor

from megapromoe.distributed.host_copy import AsyncHostCopy

SAVE_VOTE = 1 << 20
"""The value of a request to save, in the sum of requests to stop: more than any number of ranks, exact in float64."""


def votes_of(stop: bool, save: bool) -> float:
    """The requests of a rank as one number, so that they need no further kernel and no further bytes to send."""
    return float(stop + SAVE_VOTE * save)


class StepResult:
    """The result of a step, the same on every rank.

    The first read of `norm`, `applied`, `stop` or `save` waits for the device.
    """

    def __init__(self, squares_and_votes: Tensor, max_norm: float):
        """Starts the copy to the host.

        Args:
            squares_and_votes: the sum of squares of the gradient and the sum of the ranks' `votes_of`, (2,) float64; a
                third number, if there is one, is the sum of squares of the part of the gradient that is clipped.
            max_norm: the largest norm that is not a spike.
        """
        self._on_device, self._host_copy = squares_and_votes, AsyncHostCopy(squares_and_votes)
        self._max_norm = max_norm

    @cached_property
    def norm_on_device(self) -> Tensor:
        """`norm` as a tensor on the device."""
        return self._on_device[0].sqrt()

    @property
    def clipped_norm_on_device(self) -> Tensor:
        """The norm by which the gradient is clipped, as a tensor on the device: of the part that is clipped."""
        return self._on_device[2].sqrt() if len(self._on_device) > 2 else self.norm_on_device

    @cached_property
    def applied_on_device(self) -> Tensor:
        """`applied` as a tensor on the device."""
        return self.norm_on_device.isfinite() & (self.norm_on_device <= self._max_norm)

    @cached_property
    def _sums(self) -> list[float]:
        """The reduced numbers on the host, which reads them once."""
        return self._host_copy.result()

    @cached_property
    def _norm_and_votes(self) -> tuple[float, float]:
        total, votes = self._sums[:2]
        return math.sqrt(total), votes

    @property
    def clipped_norm(self) -> float:
        """The norm by which the gradient is clipped: of the part that is clipped."""
        return math.sqrt(self._sums[2]) if len(self._sums) > 2 else self.norm

    @property
    def norm(self) -> float:
        """The norm of the gradient before clipping."""
        return self._norm_and_votes[0]

    @property
    def applied(self) -> bool:
        """Whether the weights were updated: the norm was finite and not a spike."""
        return math.isfinite(self.norm) and self.norm <= self._max_norm

    @property
    def stop(self) -> bool:
        """Whether any rank requested to stop."""
        return self._norm_and_votes[1] % SAVE_VOTE > 0

    @property
    def save(self) -> bool:
        """Whether any rank requested a checkpoint."""
        return self._norm_and_votes[1] >= SAVE_VOTE
