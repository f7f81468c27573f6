"""Linear layers and the region they live in: what tensor parallelism needs from a model, and nothing more.

A *region* is a stretch of the model whose ranks each do a part of the work on the same input: heads of the attention,
columns of an MLP, rows of the MoE. `enter` copies the input in (backward sums the parts' gradients), `leave` sums the
partial outputs. Without tensor parallelism both are the identity, so the model is written once. `parallelize.py` hands
out the regions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

from torch import Tensor, nn
from torch.nn import functional as F

from megapromoe.distributed.collectives import copy_to, gather_last, reduce_from
from megapromoe.distributed.mesh import SINGLE_RANK, Group


@dataclass(frozen=True)
class Region:
    """A stretch of the model shared out over `group` (of one rank: not shared out).

    Source: the conjugate operators f and g of Megatron-LM (arXiv 1909.08053, section 3).
    """

    group: Group = SINGLE_RANK

    @property
    def shared(self) -> bool:
        return self.group.size > 1

    @property
    def size(self) -> int:
        return self.group.size

    @property
    def rank(self) -> int:
        return self.group.rank

    def enter(self, x: Tensor) -> Tensor:
        return copy_to(x, self.group)

    def leave(self, partial: Tensor) -> Tensor:
        return reduce_from(partial, self.group)

    def gather(self, x: Tensor) -> Tensor:
        """Joins slices of the last dimension."""
        return gather_last(x, self.group)


WHOLE = Region()


class ColumnLinear(nn.Linear):
    """Linear whose output features are shared out: x (..., in) -> (..., out/tp). Inside a region."""


class RowLinear(nn.Linear):
    """Linear whose input features are shared out. Ends a region.

    `forward(x (..., in/tp))` returns the whole output (..., out). `partial` leaves the sum over ranks, and the bias, to
    the caller, who merges several layers into one sum.
    """

    region: Region = WHOLE

    @overload
    def forward(self, x: Tensor, partial: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, partial: Literal[True]) -> tuple[Tensor, Tensor | None]: ...

    def forward(self, x: Tensor, partial: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        if not self.region.shared:
            y = F.linear(x, self.weight, self.bias)
            return (y, None) if partial else y
        y = F.linear(x, self.weight)
        # A clone, because ZeRO-3 takes a parameter away when its module's forward returns.
        return (y, self.bias.clone()) if partial else self.region.leave(y) + self.bias


class GatheredLinear(nn.Linear):
    """Linear whose output features are computed in slices and joined: x (..., in) -> (..., out) on every rank."""

    region: Region = WHOLE

    def forward(self, x: Tensor) -> Tensor:
        return self.region.gather(F.linear(self.region.enter(x), self.weight, self.bias))
