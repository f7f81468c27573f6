"""Dense experts of an MoE layer: shared experts, which all tokens visit, and unconditional experts of null images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megapromoe.nn.layers import Mlp, SummedMlps


class DenseHidden(NamedTuple):
    """Hidden values of the shared and the unconditional experts."""

    shared: list[Tensor]
    """Of all tokens, (T, F)."""
    unconditional: list[Tensor]
    """Of the tokens of null images."""


class Biases(NamedTuple):
    """Biases (D,) that are added after the sum over the ranks of a region; None if the outputs contain them."""

    shared: Tensor | None
    unconditional: Tensor | None


class DenseOutputs(NamedTuple):
    """Outputs of the shared and the unconditional experts; in a sharded region partial sums."""

    y_TD: Tensor
    """Of the shared experts, for all tokens; zeros without shared experts."""
    null_TD: Tensor | None
    """Of the unconditional experts, for the tokens of null images."""
    biases: Biases


def dense_experts(count: int, hidden: int, width: int, activation: str) -> Mlp | SummedMlps | None:
    """`count` shared or unconditional experts.

    A single expert is an `Mlp`, not a `SummedMlps`: older checkpoints have its parameters under these names.
    """
    if count > 1:
        return SummedMlps(Mlp(hidden, width, activation) for _ in range(count))
    return Mlp(hidden, width, activation) if count else None


def mlps_of(experts: Mlp | SummedMlps | None) -> list[Mlp]:
    """The MLPs of `MoE.shared` or `MoE.unconditional`."""
    if experts is None:
        return []
    return [experts] if isinstance(experts, Mlp) else [mlp for mlp in experts if isinstance(mlp, Mlp)]


def partial_sum(mlps: list[Mlp], hidden: list[Tensor], with_biases: bool = True) -> tuple[Tensor, Tensor | None]:
    """The summed partial outputs of MLPs with the given hidden values, and the sum of the biases not added yet.

    `with_biases`: as in `Mlp.partial`; otherwise no bias is added.
    """
    outputs = [
        mlp.partial(mlp_hidden) if with_biases else mlp.fc2.without_bias(mlp_hidden)
        for mlp, mlp_hidden in zip(mlps, hidden, strict=True)
    ]
    y, bias = outputs[0]
    for mlp_output, mlp_bias in outputs[1:]:
        y = y + mlp_output
        bias = mlp_bias if bias is None or mlp_bias is None else bias + mlp_bias
    return y, bias


def add_biases(y_TD: Tensor, biases: Biases, num_routed_tokens: int) -> Tensor:
    """Adds the biases to the sum over ranks; the first `num_routed_tokens` tokens are not of null images."""
    if biases.shared is not None:
        y_TD = y_TD + biases.shared
    if biases.unconditional is not None:
        y_TD = torch.cat([y_TD[:num_routed_tokens], y_TD[num_routed_tokens:] + biases.unconditional])
    return y_TD


def biases_of_images(biases: Biases, num_routed_images: int, like_BD: Tensor) -> Tensor | None:
    """The biases for each image (B, D), the shape of `like_BD`; the images from `num_routed_images` on are null."""
    bias_BD = None if biases.shared is None else biases.shared.expand_as(like_BD)
    if biases.unconditional is not None:
        is_null_B = torch.arange(like_BD.shape[0], device=like_BD.device) >= num_routed_images
        null_BD = is_null_B.unsqueeze(1).to(like_BD.dtype) * biases.unconditional
        bias_BD = null_BD if bias_BD is None else bias_BD + null_BD
    return bias_BD


def split_conditional(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x, its first `count` rows and its other rows, with a cheaper backward than slicing has.

    Backward adds the gradients of the two parts in place to that of x. Autograd would first write each part into zeros
    of the size of x. The gradient of x must therefore be a tensor that nothing else uses: the layers that get x as a
    whole must compute a new one, as linear layers do.
    """
    if torch.compiler.is_compiling():  # `count` may not be known to it
        return _CompiledSplit.apply(x, count)
    return _SplitConditional.apply(x, count) if count < x.shape[0] else (x, x, x[count:])


class _SplitConditional(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count):
        ctx.count, ctx.shape = count, x.shape
        ctx.set_materialize_grads(False)
        return x.view_as(x), x[:count], x[count:]

    @staticmethod
    def backward(ctx, grad, grad_first, grad_rest):
        if grad is None and grad_first is not None and grad_rest is not None:
            return torch.cat([grad_first, grad_rest]), None
        if grad is None:  # neither x as a whole nor one of its parts was used
            grad = (grad_rest if grad_first is None else grad_first).new_zeros(ctx.shape)
        if grad_first is not None:
            grad[: ctx.count].add_(grad_first)
        if grad_rest is not None:
            grad[ctx.count :].add_(grad_rest)
        return grad, None


class _CompiledSplit(torch.autograd.Function):
    """Backward in one join. That of slices would be zeros with the gradient of the rest, as a product's summand."""

    @staticmethod
    def forward(ctx, x, count):
        ctx.count = count
        return x.view_as(x), x[:count], x[count:]

    @staticmethod
    def backward(ctx, grad, grad_first, grad_rest):
        return torch.cat([grad[: ctx.count] + grad_first, grad[ctx.count :] + grad_rest]), None


class AddFrom(torch.autograd.Function):
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
