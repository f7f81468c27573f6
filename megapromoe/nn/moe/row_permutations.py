"""Permutations of rows, with a backward that is the inverse permutation.

Autograd's backward of `index_select` would add the gradients into zeros, which takes more passes over the rows and is
not reproducible on GPUs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megapromoe.nn.activations import widened
from megapromoe.nn.moe.expert_operators import bias_gradient


class DispatchMetadata(NamedTuple):
    """How the rows of a dispatch are sorted by expert, which is needed to add their outputs to their tokens.

    The other fields are those of `TokenAssignment`.
    """

    order_R: Tensor
    """The permutation that sorts the rows of the assignment by expert."""
    inverse_R: Tensor | None
    """The inverse of `order_R`; None for rows that are not token-major."""
    token_R: Tensor | None
    """The token of each row, rows sorted by expert; None for token-major rows in a compiled graph, which needs none."""
    weight_R: Tensor
    top_k: int
    first_token: int
    is_shard: bool


def inverse_permutation(order_R: Tensor) -> Tensor:
    """The permutation that undoes `order_R`, int64 (R,)."""
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.shape[0], device=order_R.device)
    return inverse_R


def sort_by_expert(expert_R: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The sorted experts of rows, and the permutation that sorts them, both int64 (R,); stable.

    A GPU sorts 8 bits of its keys in a pass over them, so that keys of int64 would take eight passes.
    """
    if not expert_R.is_cuda or num_experts > 256:
        return torch.sort(expert_R, stable=True)
    sorted_R, order_R = torch.sort(expert_R.to(torch.uint8), stable=True)
    return sorted_R.long(), order_R


class Permute(torch.autograd.Function):
    """rows[order]."""

    @staticmethod
    def forward(ctx, rows_RD, order_R, inverse_R):
        ctx.save_for_backward(inverse_R)
        return rows_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx, grad_RD):
        (inverse_R,) = ctx.saved_tensors
        return grad_RD.index_select(0, inverse_R), None, None


class GatherTokens(torch.autograd.Function):
    """The token of each row of a token-major assignment, rows sorted by expert."""

    @staticmethod
    def forward(ctx, x_TD, assignment, token_R, inverse_R):
        ctx.save_for_backward(inverse_R)
        ctx.shape, ctx.top_k, ctx.first_token = x_TD.shape, assignment.top_k, assignment.first_token
        ctx.is_shard = assignment.is_shard
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx, grad_RD):
        (inverse_R,) = ctx.saved_tensors
        grad_TD = grad_RD.index_select(0, inverse_R)
        if ctx.top_k > 1:
            grad_TD = grad_TD.view(-1, ctx.top_k, grad_TD.shape[1]).sum(1)
        if ctx.is_shard:  # other ranks of the region have the rows of the other tokens
            shard_TD, first, stop, (T, D) = grad_TD, ctx.first_token, ctx.first_token + grad_TD.shape[0], ctx.shape
            if torch.compiler.is_compiling():  # one kernel, and torch 2.11 cannot compare lengths of slices
                grad_TD = torch.cat([grad_TD.new_zeros(first, D), shard_TD, grad_TD.new_zeros(T - stop, D)])
            else:
                grad_TD = grad_TD.new_zeros(ctx.shape)
                grad_TD[first:stop] = shard_TD
        return grad_TD, None, None, None


class AddToTokens(torch.autograd.Function):
    """base + Σ weight·row for the rows of a token-major assignment, sorted by expert; writes into `base_TD`."""

    @staticmethod
    def forward(ctx, base_TD, y_RD, weight_R, metadata):
        K, first_token = metadata.top_k, metadata.first_token
        weight_R = weight_R.to(y_RD.dtype)
        y_TKD = y_RD.index_select(0, metadata.inverse_R).view(-1, K, y_RD.shape[1])
        out_TD = base_TD[first_token : first_token + y_TKD.shape[0]]
        weight_TK = weight_R.view(-1, K, 1)
        for k in range(K):
            out_TD.addcmul_(y_TKD[:, k], weight_TK[:, k])
        ctx.mark_dirty(base_TD)
        ctx.save_for_backward(y_RD, weight_R, metadata.token_R, metadata.order_R, metadata.inverse_R)
        return base_TD

    @staticmethod
    def backward(ctx, grad_TD):
        y_RD, weight_R, token_R, order_R, inverse_R = ctx.saved_tensors
        grad_RD = grad_TD.index_select(0, token_R)
        # A dot product for each row, summed in float32 or float64. Float32 copies of the rows would be the layer's
        # memory peak.
        sum_dtype = torch.promote_types(y_RD.dtype, torch.float32)
        grad_weight_R = (grad_RD * y_RD).sum(-1, dtype=sum_dtype)[inverse_R]
        return grad_TD, grad_RD.mul_(weight_R[order_R].unsqueeze(1)), grad_weight_R, None


class RowBiases(NamedTuple):
    """Biases that are added to rows before their routing weights are applied."""

    bias_ED: Tensor
    expert_R: Tensor
    """The expert of each row, rows sorted by expert."""


def add_token_sums(
    y_TD: Tensor,
    y_RD: Tensor,
    biases: RowBiases | None,
    null_TD: Tensor | None,
    metadata: DispatchMetadata,
    tokens: tuple[int, int | None],
) -> Tensor:
    """y + Σ weight·(row + bias) for the tokens of a token-major assignment, y + null for those of null images.

    For torch.compile, which makes one kernel of it.

    Args:
        y_TD: tokens (T, D), those of null images last.
        y_RD: rows, sorted by expert.
        biases: of the rows; None: they contain them.
        null_TD: what is added to the tokens of null images; None: nothing.
        metadata: of the rows; `token_R` is not used.
        tokens: how many of y's first tokens are those that are routed, and the tokens of an image, if all tokens of an
            image are rows of this rank or none. The parts are then joined by images, as a residual that follows, so
            that both are one kernel.
    """
    weight_R = metadata.weight_R.to(y_RD.dtype)
    tensors = null_TD, metadata.order_R, metadata.inverse_R, *(biases or (None, None))
    numbers = metadata.top_k, metadata.first_token, metadata.is_shard, *tokens
    return _AddTokenSums.apply(y_TD, y_RD, weight_R, *tensors, *numbers)


class _AddTokenSums(torch.autograd.Function):
    """Backward reads each gradient once: in the order of the rows it gives the gradients of row and weight."""

    @staticmethod
    def forward(ctx, y_TD, y_RD, weight_R, null_TD, order_R, inverse_R, bias_ED, expert_R, *numbers):
        ctx.save_for_backward(y_RD, weight_R, order_R, inverse_R, bias_ED, expert_R)
        ctx.has_null, ctx.numbers = null_TD is not None, numbers
        top_k, first_token, is_shard, num_routed, tokens = numbers
        (T, D), by_images = y_TD.shape, tokens is not None and not is_shard
        # Indices of the shape of the result: a view of the rows, whose number is not known, would be a copy of them.
        shape = (num_routed // tokens, tokens) if by_images else (inverse_R.shape[0] // top_k,)
        row, weight = inverse_R.view(*shape, top_k), weight_R.view(*shape, top_k)
        outputs = []
        for row_T, weight_T in zip(row.unbind(-1), weight.unbind(-1), strict=True):
            y = y_RD[row_T] if bias_ED is None else y_RD[row_T] + bias_ED[expert_R[row_T]]
            outputs.append(y * weight_T.unsqueeze(-1))
        routed = sum(outputs[1:], start=outputs[0])
        parts = [routed]
        if is_shard:  # other ranks of the region have the rows of the other tokens
            rest = num_routed - first_token - routed.shape[0]
            parts = [y_TD.new_zeros(first_token, D), routed, y_TD.new_zeros(rest, D)]
        if null_TD is not None:
            parts.append(null_TD.view(T // tokens - num_routed // tokens, tokens, D) if by_images else null_TD)
        y = y_TD.view(T // tokens, tokens, D) if by_images else y_TD
        return (y + (torch.cat(parts) if len(parts) > 1 else routed)).view(T, D)

    @staticmethod
    def backward(ctx, grad_TD):
        y_RD, weight_R, order_R, inverse_R, bias_ED, expert_R = ctx.saved_tensors
        top_k, first_token, is_shard, num_routed, _ = ctx.numbers
        token_R = order_R if top_k == 1 else order_R // top_k
        # Of all tokens: a slice of the routed ones would be a copy.
        grad_RD = grad_TD.index_select(0, token_R + first_token if is_shard else token_R)
        grad_y_RD = grad_RD * weight_R.index_select(0, order_R).unsqueeze(1)
        row_RD = widened(y_RD)
        grad_bias = None
        if bias_ED is not None:
            row_RD = row_RD + bias_ED.index_select(0, expert_R)
            grad_bias = bias_gradient(grad_y_RD, expert_R, bias_ED.shape[0])
        grad_weight_R = (grad_RD * row_RD).sum(-1).index_select(0, inverse_R).to(weight_R.dtype)
        grad_null_TD = grad_TD[num_routed:] if ctx.has_null else None
        return grad_TD, grad_y_RD, grad_weight_R, grad_null_TD, None, None, grad_bias, *[None] * 6
