"""Permutations of rows, with a backward that is the inverse permutation.

Autograd's backward of `index_select` would add the gradients into zeros, which takes more passes over the rows and is
not reproducible on GPUs.
"""

import torch
from torch import Tensor

from megapromoe.nn.moe.assignment import TokenAssignment


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
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx, grad_RD):
        (inverse_R,) = ctx.saved_tensors
        grad_TD = grad_RD.index_select(0, inverse_R)
        if ctx.top_k > 1:
            grad_TD = grad_TD.view(-1, ctx.top_k, grad_TD.shape[1]).sum(1)
        if grad_TD.shape[0] < ctx.shape[0]:  # other ranks of the region have the rows of the other tokens
            shard_TD, grad_TD = grad_TD, grad_TD.new_zeros(ctx.shape)
            grad_TD[ctx.first_token : ctx.first_token + shard_TD.shape[0]] = shard_TD
        return grad_TD, None, None, None


class AddToTokens(torch.autograd.Function):
    """base + Σ weight·row for the rows of a token-major assignment, sorted by expert; writes into `base_TD`."""

    @staticmethod
    def forward(ctx, base_TD, y_RD, weight_R, metadata):
        K, first_token = metadata.assignment.top_k, metadata.assignment.first_token
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


def add_to_tokens(
    base_TD: Tensor, y_RD: Tensor, assignment: TokenAssignment, order_R: Tensor, inverse_R: Tensor
) -> Tensor:
    """`AddToTokens` in a new tensor, for torch.compile, which fuses it; only for rows of all tokens of `base_TD`.

    It does not write into `base_TD`: torch.compile of torch 2.11 loses the gradient of a tensor that an
    autograd.Function changed in place and returned (pytorch issue 180642).
    """
    weight_R1 = assignment.weight_R.to(y_RD.dtype).unsqueeze(1)
    y_TKD = (Permute.apply(y_RD, inverse_R, order_R) * weight_R1).view(-1, assignment.top_k, y_RD.shape[1])
    return base_TD + (y_TKD.squeeze(1) if assignment.top_k == 1 else y_TKD.sum(1))
