"""Base class of the baselines that use our parameters: they keep the router and the dense experts of our layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megapromoe.errors import UserError
from megapromoe.nn.layers import Mlp
from megapromoe.nn.moe.assignment import TokenAssignment
from megapromoe.nn.moe.auxiliary import MoEAuxiliary
from megapromoe.nn.moe.layer import MoE, auxiliary_of
from megapromoe.nn.moe.routers import PrototypeRouter

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
        raise CannotRun(f"model.router = {moe.config.router!r}: needs one with prototypes, such as promoe_tc")
    return moe.router.prototypes


class BaselineWrapper(nn.Module):
    """A layer that runs the routed experts of an `MoE` in another way, with the same parameters and results."""

    def __init__(self, moe: MoE):
        super().__init__()
        self.moe = moe

    def forward(
        self, x_BSD: Tensor, num_conditional: int, y_B: Tensor | None = None, scored_BSD: Tensor | None = None
    ) -> tuple[Tensor, MoEAuxiliary]:
        inputs, routed = self.moe.route(x_BSD, num_conditional, y_B, None, scored_BSD)
        y_BSD, dropped = self.run_experts(*inputs)
        return y_BSD, auxiliary_of(routed, dropped)

    def run_experts(
        self, x_BSD: Tensor, assignment: TokenAssignment, num_conditional: int
    ) -> tuple[Tensor, Tensor | None]:
        """As `MoE.run_experts`; all images without a class are null images, since there is an unconditional expert."""
        raise NotImplementedError

    def dense_output(self, x_TD: Tensor, num_conditional_tokens: int) -> Tensor:
        """Output (T, D) of the shared and the unconditional expert; tokens after the conditional ones are null."""
        shared, unconditional = dense_experts(self.moe)
        y_TD, n = shared(x_TD), num_conditional_tokens
        return torch.cat([y_TD[:n], y_TD[n:] + unconditional(x_TD[n:])])


Layer = MoE | BaselineWrapper | Mlp
"""A layer that replaces the MLP of a block in a comparison."""
