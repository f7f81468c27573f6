"""What all baselines with our parameters share: the router and the dense experts of our layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megapromoe.errors import UserError
from megapromoe.nn.moe.layer import MoE
from megapromoe.nn.moe.routers import Routed

# Slots of an expert, as a multiple of its even share of the tokens; the usual choice of GShard and Switch.
CAPACITY = 1.25


class CannotRun(UserError):
    """A baseline that does not run on this machine, or not with these sizes; the message gives the reason."""


class BaselineWrapper(nn.Module):
    """A layer around ours that keeps its router, its shared and its unconditional expert."""

    def __init__(self, moe: MoE):
        super().__init__()
        self.moe = moe

    def route(self, *arguments) -> Routed:
        return self.moe.route(*arguments)

    def routable(self, *arguments) -> int:
        return self.moe.routable(*arguments)

    def losses_of(self, all_routed: Sequence[Routed]) -> dict[str, Tensor]:
        return self.moe.losses_of(all_routed)

    def beside(self, x_TD: Tensor, cut: int) -> Tensor:
        """What the shared and the unconditional expert make of tokens, those from `cut` on being null."""
        y_TD = self.moe.shared(x_TD)
        return torch.cat([y_TD[:cut], y_TD[cut:] + self.moe.unconditional(x_TD[cut:])])
