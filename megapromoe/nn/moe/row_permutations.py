"""Permutations of rows, with a backward that is the inverse permutation.

Autograd's backward of `index_select` would add the gradients into zeros, which takes more passes over the rows and is
not reproducible on GPUs.
"""

from typing import NamedTuple

import torch
from torch import Tensor


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


def token_sums(y_RD: Tensor, metadata: DispatchMetadata) -> Tensor:
    """Σ weight·row for the tokens of a token-major assignment, rows sorted by expert; for torch.compile."""
    weight_R = metadata.weight_R.to(y_RD.dtype)
    return _TokenSums.apply(y_RD, weight_R, metadata.order_R, metadata.inverse_R, metadata.top_k)


class _TokenSums(torch.autograd.Function):
    """Backward reads each gradient once: in the order of the rows it gives the gradients of row and weight."""

    @staticmethod
    def forward(ctx, y_RD, weight_R, order_R, inverse_R, top_k):
        ctx.save_for_backward(y_RD, weight_R, order_R, inverse_R)
        ctx.top_k = top_k
        y_RD = y_RD.index_select(0, inverse_R) * weight_R.unsqueeze(1)
        return y_RD if top_k == 1 else y_RD.view(-1, top_k, y_RD.shape[1]).sum(1)

    @staticmethod
    def backward(ctx, grad_TD):
        y_RD, weight_R, order_R, inverse_R = ctx.saved_tensors
        token_R = order_R if ctx.top_k == 1 else order_R // ctx.top_k
        grad_RD = grad_TD.index_select(0, token_R)
        precision = torch.promote_types(y_RD.dtype, torch.float32)
        grad_weight_R = (grad_RD.to(precision) * y_RD).sum(-1).index_select(0, inverse_R)
        return grad_RD * weight_R.index_select(0, order_R).unsqueeze(1), grad_weight_R.to(weight_R.dtype), *[None] * 3
