"""Base class of the baselines that use our parameters: they keep the router and the dense experts of our layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megapromoe.errors import UserError
from megapromoe.nn.layers import Mlp
from megapromoe.nn.moe.layer import MoE
from megapromoe.nn.moe.routers import PrototypeRouter, RouterOutput

# Slots of an expert over its even share of the tokens; the usual choice of GShard and Switch.
CAPACITY_FACTOR = 1.25


class CannotRun(UserError):
    """A baseline cannot run on this machine or with these sizes; the message gives the reason."""


def dense_experts(moe: MoE) -> tuple[Mlp, Mlp]:
    """The shared and the unconditional expert. Raises CannotRun for a layer without one, or with several."""
    if moe.shared is None or moe.unconditional is None:
        raise CannotRun("needs model.shared_expert=true and model.unconditional_expert=true")
    if not isinstance(moe.shared, Mlp) or not isinstance(moe.unconditional, Mlp):
        raise CannotRun("needs model.num_shared_experts=1 and model.num_unconditional_experts=1")
    return moe.shared, moe.unconditional


def prototypes_of(moe: MoE) -> Tensor:
    """The prototypes of the router, (E, D). Raises CannotRun for a router without prototypes."""
    if not isinstance(moe.router, PrototypeRouter):
        raise CannotRun(f"model.router = {moe.router.config.router!r}: needs one with prototypes, such as promoe_tc")
    return moe.router.prototypes


class BaselineWrapper(nn.Module):
    """A layer that runs the routed experts of an `MoE` in another way, with the same methods and parameters."""

    def __init__(self, moe: MoE):
        super().__init__()
        self.moe = moe

    @property
    def dropped(self) -> float:
        """Share of the rows of the last call that were dropped, 0 to 1."""
        return 0.0

    def route(self, *arguments: Any) -> RouterOutput:
        return self.moe.route(*arguments)

    def num_routed_images(self, *arguments: Any) -> int:
        return self.moe.num_routed_images(*arguments)

    def auxiliary_losses(self, router_outputs: Sequence[RouterOutput]) -> dict[str, Tensor]:
        return self.moe.auxiliary_losses(router_outputs)

    def dense_output(self, x_TD: Tensor, num_conditional_tokens: int) -> Tensor:
        """Output (T, D) of the shared and the unconditional expert; tokens after the conditional ones are null."""
        shared, unconditional = dense_experts(self.moe)
        y_TD, n = shared(x_TD), num_conditional_tokens
        return torch.cat([y_TD[:n], y_TD[n:] + unconditional(x_TD[n:])])


Layer = MoE | BaselineWrapper | Mlp
"""A layer that replaces the MLP of a block in a comparison."""
