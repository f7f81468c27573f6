"""What a router decides once for a batch, however often its scores are computed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Decisions:
    """What a first pass over a batch decided, told the other ranks and changed; a second pass takes it from here.

    A pass that makes activations again (`parallel.recompute=all`) computes scores anew, for their gradient. It must not
    choose anew: rounding could flip a near-tie, and with it the sizes of the all-to-all. Nor may it speak to other
    ranks again, or move a router's running state twice. Kept are the choices (an index a row) and sums over ranks
    (a few numbers an expert, or its centroid), nothing of the size of the tokens.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[Tensor, bool]] = {}
        self._done: set[str] = set()

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns in the first pass, in every pass. Gradients flow through the first pass's tensor.

        `make` must keep nothing for the backward pass, since a second pass does not call it: collectives, or detached
        tensors.
        """
        if name not in self._made:
            value = make()
            self._made[name] = (value.detach(), value.requires_grad)
            return value
        value, differentiable = self._made[name]
        # Of the second pass autograd wants the same tensors saved, and no gradient.
        return value.detach().requires_grad_(differentiable)

    def run_once(self, name: str, update: Callable[[], None]) -> None:
        """Calls `update` in the first pass, and in no other."""
        if name not in self._done:
            update()
            self._done.add(name)
