"""Products of rows with the matrix of their expert, as operators that torch.compile calls without looking inside.

A compiled graph needs them because how many rows an expert has is known only to the device, or, where experts are
looped over, only after the host has read it. The shapes of their results do not depend on it.

`end_E` is the index after the last row of each expert, int32 (E,). `grouped`: one product for all experts, see
`expert_linear.has_grouped_mm_kernel`, with `end_E` on the device of the rows; otherwise a loop over the experts, with
`end_E` on the host, from `offsets_on_host`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megapromoe.nn.activations import gelu_slope, gelu_value, rounded, widened


@torch.library.custom_op("megapromoe::offsets_on_host", mutates_args=())
def offsets_on_host(end_E: Tensor) -> Tensor:
    """A copy on the host, which waits for it."""
    return end_E.to("cpu", copy=True)


@offsets_on_host.register_fake
def _(end_E: Tensor) -> Tensor:
    return end_E.new_empty(end_E.shape, device="cpu")


@torch.library.custom_op("megapromoe::expert_product", mutates_args=())
def expert_product(x_RD: Tensor, weight_EFD: Tensor, end_E: Tensor, grouped: bool) -> Tensor:
    """Each row (R, D), sorted by expert, times the transposed matrix (F, D) of its expert: (R, F)."""
    if not x_RD.shape[0]:
        return x_RD.new_empty(0, weight_EFD.shape[1])
    if grouped:
        return F.grouped_mm(x_RD, weight_EFD.transpose(1, 2), offs=end_E)
    y_RF = x_RD.new_empty(x_RD.shape[0], weight_EFD.shape[1])
    for x, y, weight in zip(*_split((x_RD, y_RF), end_E), weight_EFD, strict=True):
        torch.mm(x, weight.T, out=y)
    return y_RF


@expert_product.register_fake
def _(x_RD: Tensor, weight_EFD: Tensor, end_E: Tensor, grouped: bool) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], weight_EFD.shape[1])


@torch.library.custom_op("megapromoe::expert_product_backward", mutates_args=())
def expert_product_backward(
    grad_RF: Tensor, x_RD: Tensor, weight_EFD: Tensor, end_E: Tensor, grouped: bool, skips_empty: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of rows and matrices; zero for an expert without rows.

    `skips_empty`: see `expert_linear.grouped_mm_skips_empty_groups`.
    """
    grad_RF = grad_RF.contiguous()
    if not x_RD.shape[0]:
        return torch.zeros_like(x_RD), torch.zeros_like(weight_EFD)
    if grouped:
        grad_x = F.grouped_mm(grad_RF, weight_EFD, offs=end_E)
        grad_weight = F.grouped_mm(grad_RF.T, x_RD, offs=end_E)
        if skips_empty:
            empty_E = end_E.diff(prepend=end_E.new_zeros(1)) == 0
            grad_weight.masked_fill_(empty_E.view(-1, 1, 1), 0)
        return grad_x, grad_weight
    grad_x, grad_weight = torch.empty_like(x_RD), torch.empty_like(weight_EFD)
    rows = _split((grad_RF, x_RD, grad_x), end_E)
    for grad, x, gx, weight, gw in zip(*rows, weight_EFD, grad_weight, strict=True):
        torch.mm(grad, weight, out=gx)
        torch.mm(grad.T, x, out=gw)
    return grad_x, grad_weight


@expert_product_backward.register_fake
def _(
    grad_RF: Tensor, x_RD: Tensor, weight_EFD: Tensor, end_E: Tensor, grouped: bool, skips_empty: bool
) -> tuple[Tensor, Tensor]:
    return x_RD.new_empty(x_RD.shape), weight_EFD.new_empty(weight_EFD.shape)


def _split(tensors: tuple[Tensor, ...], end_E: Tensor) -> list[tuple[Tensor, ...]]:
    """The rows of each expert, for each tensor."""
    ends = end_E.tolist()[:-1]
    return [tensor.tensor_split(ends) for tensor in tensors]


class TracedExperts(torch.autograd.Function):
    """A linear layer of experts, optionally with bias and GELU, for torch.compile, which fuses bias and GELU.

    The product is kept for the backward pass without its bias, which is added again there. The gradient of the biases
    is a product with the one-hot matrix of the rows' experts, which both layers of the experts share. Unlike index_add
    it is reproducible.
    """

    @staticmethod
    def forward(ctx, x_RD, weight_EFD, bias_EF, expert_R, end_E, grouped, skips_empty, gelu):
        y_RF = expert_product(x_RD, weight_EFD, end_E, grouped)
        ctx.save_for_backward(x_RD, weight_EFD, expert_R, end_E, *((y_RF, bias_EF) if gelu else ()))
        ctx.grouped, ctx.skips_empty, ctx.has_bias = grouped, skips_empty, bias_EF is not None
        if bias_EF is None:
            return y_RF
        biased_RF = widened(y_RF) + bias_EF.index_select(0, expert_R)
        return rounded(gelu_value(biased_RF) if gelu else biased_RF, y_RF.dtype)

    @staticmethod
    def backward(ctx, grad_RF):
        x_RD, weight_EFD, expert_R, end_E, *gelu_input = ctx.saved_tensors
        if gelu_input:
            y_RF, bias_EF = gelu_input
            # Not index_select: torch would keep its result from the forward pass, a bias for each row.
            bias_RF = bias_EF.gather(0, expert_R.unsqueeze(1).expand_as(y_RF))
            grad_RF = (grad_RF * gelu_slope(widened(y_RF) + bias_RF)).to(grad_RF.dtype)
        grad_x, grad_weight = expert_product_backward(grad_RF, x_RD, weight_EFD, end_E, ctx.grouped, ctx.skips_empty)
        grad_bias = bias_gradient(grad_RF, expert_R, weight_EFD.shape[0]) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, *[None] * 5


def bias_gradient(grad_RF: Tensor, expert_R: Tensor, num_experts: int) -> Tensor:
    """The sums (E, F) of the rows of each expert."""
    every_E = torch.arange(num_experts, device=expert_R.device)
    return (expert_R == every_E.unsqueeze(1)).to(grad_RF.dtype) @ grad_RF
