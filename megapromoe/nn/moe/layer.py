"""The mixture-of-experts layer, which replaces the MLP of a block.

Output: shared(x) + Σ weight·expert(x) for the tokens of conditional images, shared(x) + unconditional(x) for those of
null images. With several shared or unconditional experts, their outputs are summed. Null images are the last of a batch
and their number is known on the host, so the unconditional expert runs on a slice and its tokens are never dispatched.

Source: ProMoE, arXiv 2510.24711, "Two-step router".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megapromoe.config.options import ModelConfig
from megapromoe.nn.layers import Mlp, SummedMlps
from megapromoe.nn.moe.diffmoe_router import DiffMoERouter
from megapromoe.nn.moe.dispatcher import Dispatcher
from megapromoe.nn.moe.expert_linear import ExpertLinear, ExpertOffsets
from megapromoe.nn.moe.guided_routers import ClassificationRouter, KMeansRouter
from megapromoe.nn.moe.routers import (
    ExpertChoiceRouter,
    LinearRouter,
    PrototypeExpertChoiceRouter,
    PrototypeRouter,
    Router,
    RouterOutput,
)
from megapromoe.nn.moe.routing_cache import RoutingCache
from megapromoe.nn.tensor_parallel import NO_TENSOR_PARALLEL, Region

ROUTERS: dict[str, type[Router]] = {
    "promoe": PrototypeRouter,
    "promoe_ec": PrototypeExpertChoiceRouter,
    "promoe_linear": LinearRouter,
    "tc": LinearRouter,
    "ec": ExpertChoiceRouter,
    "diffmoe": DiffMoERouter,
    "classification": ClassificationRouter,
    "kmeans": KMeansRouter,
}
"""`model.router` -> class."""


class Experts(nn.Module):
    """The routed experts of one rank: Linear(D→F) · tanh-GELU · Linear(F→D) each, with stacked parameters."""

    def __init__(self, experts: int, width: int, hidden: int):
        super().__init__()
        self.fc1 = ExpertLinear(experts, width, hidden, gelu=True)
        self.fc2 = ExpertLinear(experts, hidden, width, is_down_projection=True)

    def forward(self, x_RD: Tensor, offsets: ExpertOffsets) -> Tensor:
        """Rows (R, D) sorted by expert -> (R, D); see `ExpertLinear`."""
        return self.fc2(self.fc1(x_RD, offsets), offsets)


class MoE(nn.Module):
    """Router, routed experts, shared and unconditional experts.

    The layer is one region: tensor parallelism divides the columns of the dense experts and the rows of the routed
    ones.
    """

    region: Region = NO_TENSOR_PARALLEL

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, width = config.hidden_size, config.moe_width
        self.router = ROUTERS[config.router](config)
        self.experts = Experts(config.num_experts, D, width)
        self.shared = _dense_experts(config.shared_experts, D, config.shared_width)
        self.unconditional = _dense_experts(config.unconditional_experts, D, width)
        self.dispatcher = Dispatcher(config.num_experts)

    def route(
        self,
        x_BSD: Tensor,
        num_conditional: int,
        y_B: Tensor | None = None,
        routing_cache: RoutingCache | None = None,
    ) -> RouterOutput:
        """Assigns experts to the tokens of the routed images.

        Args:
            x_BSD: tokens of all images, or only of the routed ones, which come first.
            num_conditional: how many images are not null.
            y_B: the labels of all images; only the classification router needs them.
            routing_cache: the decisions of an earlier pass over the same batch.
        """
        images = self.num_routed_images(x_BSD, num_conditional)
        return self.router(x_BSD[:images], None if y_B is None else y_B[:images], routing_cache)

    def num_routed_images(self, x_BSD: Tensor, num_conditional: int) -> int:
        """How many images are routed: the conditional ones, or all of them if there is no unconditional expert."""
        return x_BSD.shape[0] if self.unconditional is None else num_conditional

    def auxiliary_losses(self, router_outputs: Sequence[RouterOutput]) -> dict[str, Tensor]:
        """The weighted losses (M,) of M layers that are configured as this one. Collective."""
        return self.router.auxiliary_losses(router_outputs)

    def forward(self, x_BSD: Tensor, routed: RouterOutput, num_conditional: int) -> Tensor:
        """Tokens (B, S, D), those of `num_conditional` conditional images first -> (B, S, D)."""
        B, S, D = x_BSD.shape
        x_TD = self.region.copy_to_region(x_BSD).reshape(B * S, D)
        num_routed_tokens = self.num_routed_images(x_BSD, num_conditional) * S
        x_TD, routed_TD, null_TD = split_conditional(x_TD, num_routed_tokens)

        # The shared and the unconditional experts run between the calls of the dispatcher and overlap communication.
        dispatched = self.dispatcher.dispatch(routed_TD, routed.assignment, B * S)
        shared, unconditional = mlps_of(self.shared), mlps_of(self.unconditional)
        hidden = [mlp.hidden(x_TD) for mlp in shared]
        null_hidden = [mlp.hidden(null_TD) for mlp in unconditional]
        expert_outputs = self.dispatcher.run_experts(dispatched, self.experts)
        bias, null_bias = None, None
        if shared:
            y_TD, bias = _partial_sum(shared, hidden)
        else:
            y_TD = torch.zeros_like(x_TD)
        if unconditional:
            null_TD, null_bias = _partial_sum(unconditional, null_hidden)
            y_TD = _AddFrom.apply(y_TD, null_TD, num_routed_tokens)
        y_TD = self.region.reduce_from_region(self.dispatcher.combine(expert_outputs, y_TD))
        if bias is not None:
            y_TD = y_TD + bias
        if null_bias is not None:
            y_TD = torch.cat([y_TD[:num_routed_tokens], y_TD[num_routed_tokens:] + null_bias])
        return y_TD.view(B, S, D)


def _dense_experts(count: int, hidden: int, width: int) -> Mlp | SummedMlps | None:
    """`count` shared or unconditional experts.

    A single expert is an `Mlp`, not a `SummedMlps`: older checkpoints have its parameters under these names.
    """
    if count > 1:
        return SummedMlps(Mlp(hidden, width) for _ in range(count))
    return Mlp(hidden, width) if count else None


def mlps_of(experts: Mlp | SummedMlps | None) -> list[Mlp]:
    """The MLPs of `MoE.shared` or `MoE.unconditional`."""
    if experts is None:
        return []
    return [experts] if isinstance(experts, Mlp) else [mlp for mlp in experts if isinstance(mlp, Mlp)]


def _partial_sum(mlps: list[Mlp], hidden: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The summed partial outputs of MLPs with the given hidden values, and the sum of the biases not added yet."""
    y, bias = mlps[0].partial(hidden[0])
    for mlp, mlp_hidden in zip(mlps[1:], hidden[1:], strict=True):
        mlp_output, mlp_bias = mlp.partial(mlp_hidden)
        y = y + mlp_output
        bias = mlp_bias if bias is None or mlp_bias is None else bias + mlp_bias
    return y, bias


def split_conditional(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x, its first `count` rows and its other rows, with a cheaper backward than slicing has.

    Backward adds the gradients of the two parts in place to that of x. Autograd would first write each part into zeros
    of the size of x. The gradient of x must therefore be a tensor that nothing else uses: the layers that get x as a
    whole must compute a new one, as linear layers do.
    """
    return _SplitConditional.apply(x, count) if count < x.shape[0] else (x, x, x[count:])


class _SplitConditional(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count):
        ctx.count = count
        ctx.set_materialize_grads(False)
        return x.view_as(x), x[:count], x[count:]

    @staticmethod
    def backward(ctx, grad, grad_first, grad_rest):
        if grad is None:  # x as a whole was not used, both parts were
            return torch.cat([grad_first, grad_rest]), None
        if grad_first is not None:
            grad[: ctx.count].add_(grad_first)
        if grad_rest is not None:
            grad[ctx.count :].add_(grad_rest)
        return grad, None


class _AddFrom(torch.autograd.Function):
    """Adds rows to the rows of `x_TD` from index `start` on, in place."""

    @staticmethod
    def forward(ctx, x_TD, rows_RD, start):
        x_TD[start:].add_(rows_RD)
        ctx.mark_dirty(x_TD)
        ctx.start = start
        return x_TD

    @staticmethod
    def backward(ctx, grad_TD):
        return grad_TD, grad_TD[ctx.start :], None
