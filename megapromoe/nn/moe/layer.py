"""The mixture-of-experts layer that replaces a block's MLP.

Output = shared(x) + Σ weight·expert(x) for conditional tokens, shared(x) + unconditional(x) for null ones; of several
shared or unconditional experts the sum. Which images are null is known on the host and they come last, so the
unconditional expert works on a slice and its tokens never travel. Source: ProMoE, arXiv 2510.24711, "Two-step router".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megapromoe.config.options import ModelConfig
from megapromoe.nn.layers import Mlp, SummedMlps
from megapromoe.nn.moe.dispatcher import Dispatcher
from megapromoe.nn.moe.expert_linear import ExpertLinear, Segments
from megapromoe.nn.moe.guided_routers import GUIDED
from megapromoe.nn.moe.routers import ROUTERS as UNGUIDED
from megapromoe.nn.moe.routers import Routed
from megapromoe.nn.moe.routing_cache import Decisions
from megapromoe.nn.tensor_parallel import WHOLE, Region

ROUTERS = UNGUIDED | GUIDED


class Experts(nn.Module):
    """The routed experts of one rank, stacked: Linear(D→F) · tanh-GELU · Linear(F→D) each."""

    def __init__(self, experts: int, width: int, hidden: int):
        super().__init__()
        self.fc1 = ExpertLinear(experts, width, hidden, gelu=True)
        self.fc2 = ExpertLinear(experts, hidden, width, closes=True)

    def forward(self, x_RD: Tensor, segments: Segments) -> Tensor:
        """Rows (R, D) sorted by expert -> (R, D); see `ExpertLinear`."""
        return self.fc2(self.fc1(x_RD, segments), segments)


class MoE(nn.Module):
    """Router, routed experts, and the dense experts beside them. A region: tp shares out rows and columns."""

    region: Region = WHOLE

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, width = config.hidden_size, config.moe_width
        self.router = ROUTERS[config.router](config)
        self.experts = Experts(config.num_experts, D, width)
        self.shared = _dense_experts(config.shared_experts, D, config.shared_width)
        self.unconditional = _dense_experts(config.unconditional_experts, D, width)
        self.dispatcher = Dispatcher(config.num_experts)

    def route(
        self, x_BSD: Tensor, conditional: int, y_B: Tensor | None = None, decided: Decisions | None = None
    ) -> Routed:
        """Routes the tokens of the first `conditional` images (of all, without an unconditional expert).

        `x_BSD`: of all images, or only of those to be routed. `y_B`: the labels of all images, from which the router of
        super-classes learns. `decided`: what the router decided in an earlier pass over the same batch.
        """
        images = self.routable(x_BSD, conditional)
        return self.router(x_BSD[:images], None if y_B is None else y_B[:images], decided)

    def routable(self, x_BSD: Tensor, conditional: int) -> int:
        """How many images, of which the first `conditional` are not null, are routed."""
        return x_BSD.shape[0] if self.unconditional is None else conditional

    def losses_of(self, all_routed: Sequence[Routed]) -> dict[str, Tensor]:
        """The weighted losses (L,) of several layers like this one. Collective."""
        return self.router.losses_of(all_routed)

    def forward(self, x_BSD: Tensor, routed: Routed, conditional: int) -> Tensor:
        """Tokens (B, S, D) of `conditional` images and then null ones -> (B, S, D)."""
        B, S, D = x_BSD.shape
        x_TD = self.region.enter(x_BSD).reshape(B * S, D)
        cut = self.routable(x_BSD, conditional) * S
        x_TD, routed_TD, null_TD = fan_out(x_TD, cut)

        begun = self.dispatcher.begin(routed_TD, routed.route, B * S)
        # What needs no routing stands between the stages of the dispatch, and covers what travels.
        shared, unconditional = mlps_of(self.shared), mlps_of(self.unconditional)
        hidden = [mlp.hidden(x_TD) for mlp in shared]
        null_hidden = [mlp.hidden(null_TD) for mlp in unconditional]
        computed = self.dispatcher.compute(begun, self.experts)
        bias, null_bias = None, None
        if shared:
            y_TD, bias = _partial_sum(shared, hidden)
        else:
            y_TD = torch.zeros_like(x_TD)
        if unconditional:
            null_TD, null_bias = _partial_sum(unconditional, null_hidden)
            y_TD = _AddAfter.apply(y_TD, null_TD, cut)
        y_TD = self.region.leave(self.dispatcher.finish(computed, y_TD))
        if bias is not None:
            y_TD = y_TD + bias
        if null_bias is not None:
            y_TD = torch.cat([y_TD[:cut], y_TD[cut:] + null_bias])
        return y_TD.view(B, S, D)


def _dense_experts(count: int, hidden: int, width: int) -> Mlp | SummedMlps | None:
    """Experts that all their tokens visit. One alone has the parameter names it had before there could be several."""
    if count > 1:
        return SummedMlps(Mlp(hidden, width) for _ in range(count))
    return Mlp(hidden, width) if count else None


def mlps_of(experts: Mlp | SummedMlps | None) -> list[Mlp]:
    """The MLPs of `MoE.shared` or `MoE.unconditional`."""
    if experts is None:
        return []
    return [experts] if isinstance(experts, Mlp) else [mlp for mlp in experts if isinstance(mlp, Mlp)]


def _partial_sum(mlps: list[Mlp], hidden: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The sum of the partial outputs of MLPs, from their hidden values, and of the biases still to be added."""
    y, bias = mlps[0].partial(hidden[0])
    for mlp, one in zip(mlps[1:], hidden[1:], strict=True):
        more, more_bias = mlp.partial(one)
        y = y + more
        bias = more_bias if bias is None or more_bias is None else bias + more_bias
    return y, bias


def fan_out(x: Tensor, cut: int) -> tuple[Tensor, Tensor, Tensor]:
    """`x` for those who want all of it, its rows before `cut`, and the others.

    Backward, the parts' gradients are added in place to that of all, which must be nobody else's: as a linear layer
    makes it. Autograd would first lay each part in zeros of the size of `x`.
    """
    return _FanOut.apply(x, cut) if cut < x.shape[0] else (x, x, x[cut:])


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cut):
        ctx.cut = cut
        ctx.set_materialize_grads(False)
        return x.view_as(x), x[:cut], x[cut:]

    @staticmethod
    def backward(ctx, grad, grad_first, grad_last):
        if grad is None:  # nobody wanted all of it, somebody each part
            return torch.cat([grad_first, grad_last]), None
        if grad_first is not None:
            grad[: ctx.cut].add_(grad_first)
        if grad_last is not None:
            grad[ctx.cut :].add_(grad_last)
        return grad, None


class _AddAfter(torch.autograd.Function):
    """Adds rows to those of `x_TD` from row `cut` on, in place."""

    @staticmethod
    def forward(ctx, x_TD, rows_RD, cut):
        x_TD[cut:].add_(rows_RD)
        ctx.mark_dirty(x_TD)
        ctx.cut = cut
        return x_TD

    @staticmethod
    def backward(ctx, grad_TD):
        return grad_TD, grad_TD[ctx.cut :], None
