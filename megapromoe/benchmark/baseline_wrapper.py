"""What all baselines with our parameters share: the router and the dense experts of our layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megapromoe.errors import UserError
from megapromoe.nn.layers import Mlp
from megapromoe.nn.moe.layer import MoE
from megapromoe.nn.moe.routers import PrototypeRouter, Routed

# Slots of an expert, as a multiple of its even share of the tokens; the usual choice of GShard and Switch.
CAPACITY = 1.25


class CannotRun(UserError):
    """A baseline that does not run on this machine, or not with these sizes; the message gives the reason."""


def dense_experts(moe: MoE) -> tuple[Mlp, Mlp]:
    """The shared and the unconditional expert. Raises CannotRun for a layer that lacks one, or has several."""
    if moe.shared is None or moe.unconditional is None:
        raise CannotRun("needs model.shared_expert=true and model.unconditional_expert=true")
    if not isinstance(moe.shared, Mlp) or not isinstance(moe.unconditional, Mlp):
        raise CannotRun("needs model.num_shared_experts=1 and model.num_unconditional_experts=1")
    return moe.shared, moe.unconditional


def prototypes_of(moe: MoE) -> Tensor:
    """The router's prototypes, (E, D). Raises CannotRun for a router without."""
    if not isinstance(moe.router, PrototypeRouter):
        raise CannotRun(f"model.router = {moe.router.config.router!r}: needs one with prototypes, such as promoe_tc")
    return moe.router.prototypes


class BaselineWrapper(nn.Module):
    """A layer around ours that keeps its router, its shared and its unconditional expert."""

    def __init__(self, moe: MoE):
        super().__init__()
        self.moe = moe

    @property
    def dropped(self) -> float:
        """Share of the last call's rows that no expert computed."""
        return 0.0

    def route(self, *arguments: Any) -> Routed:
        return self.moe.route(*arguments)

    def routable(self, *arguments: Any) -> int:
        return self.moe.routable(*arguments)

    def losses_of(self, all_routed: Sequence[Routed]) -> dict[str, Tensor]:
        return self.moe.losses_of(all_routed)

    def beside(self, x_TD: Tensor, cut: int) -> Tensor:
        """Output of the shared and the unconditional expert for tokens (T, D), those from `cut` on being null."""
        shared, unconditional = dense_experts(self.moe)
        y_TD = shared(x_TD)
        return torch.cat([y_TD[:cut], y_TD[cut:] + unconditional(x_TD[cut:])])


Layer = MoE | BaselineWrapper | Mlp
"""What takes the place of a block's MLP in a comparison."""
