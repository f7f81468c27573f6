"""Keeps what a router decides for a batch, so that recomputed activations use the same decisions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class RoutingCache:
    """The decisions of the first forward pass over a batch, reused by a second pass over the same batch.

    With `parallel.recompute=all` the backward pass runs the router a second time, because the gradient needs the
    scores. The second pass must not choose experts again: rounding could change the choice between nearly equal scores,
    and with it the sizes of the all-to-all. It must not repeat collectives either, or update a router's running state
    twice.

    The cache keeps the chosen experts (an index for each row) and sums over ranks (a few numbers for each expert, or
    its centroid). It keeps nothing as large as the tokens.
    """

    def __init__(self) -> None:
        self._values: dict[str, tuple[Tensor, bool]] = {}
        self._finished: set[str] = set()

    def get_or_compute(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """The result of `compute` in the first pass, returned in every pass.

        Gradients flow through the tensor of the first pass. `compute` must save nothing for backward, since the second
        pass does not call it: it may run collectives or use detached tensors.
        """
        if name not in self._values:
            value = compute()
            self._values[name] = (value.detach(), value.requires_grad)
            return value
        value, requires_grad = self._values[name]
        # Checkpointing only checks that the second pass saves tensors of the same kind; it uses no gradient of this
        # one.
        return value.detach().requires_grad_(requires_grad)

    def run_once(self, name: str, update: Callable[[], None]) -> None:
        """Calls `update` in the first pass only."""
        if name not in self._finished:
            update()
            self._finished.add(name)
