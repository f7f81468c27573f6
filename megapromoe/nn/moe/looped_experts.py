"""Linear layers and MLPs of experts by a loop over the experts, for devices without a kernel of grouped products.

Rows are sorted by expert, and how many each expert has is known on the host. Every product writes into its part of one
tensor. All functions have a handwritten backward, because autograd's passes over the rows more often. All return
gradients of zero for an expert without rows, not None: ZeRO reduces gradients in the order in which they are ready, and
ranks with different orders would reduce different gradients together.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


class LoopedLinear(torch.autograd.Function):
    """Rows times the matrix of their expert, plus its bias, optionally through a GELU."""

    @staticmethod
    def forward(ctx, x_RD: Tensor, weight_EFD: Tensor, bias_EF: Tensor, host_end_E: list[int], gelu: bool) -> Tensor:
        y_RF = x_RD.new_empty(x_RD.shape[0], weight_EFD.shape[1])
        out_RF = torch.empty_like(y_RF) if gelu else y_RF
        rows = (tensor.tensor_split(host_end_E[:-1]) for tensor in (x_RD, y_RF, out_RF))
        for x, y, out, weight, bias in zip(*rows, weight_EFD, bias_EF, strict=True):
            torch.addmm(bias, x, weight.T, out=y)
            if gelu:
                torch.ops.aten.gelu.out(y, approximate="tanh", out=out)
        ctx.save_for_backward(x_RD, weight_EFD, y_RF if gelu else None)
        ctx.host_end_E = host_end_E
        return out_RF

    @staticmethod
    def backward(ctx, grad_RF: Tensor) -> tuple:
        x_RD, weight_EFD, gelu_input_RF = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x_RD), torch.empty_like(weight_EFD)
        grad_bias = weight_EFD.new_empty(weight_EFD.shape[:2])
        rows = [tensor.tensor_split(ctx.host_end_E[:-1]) for tensor in (grad_RF, x_RD, grad_x)]
        if gelu_input_RF is not None:
            rows[0] = _gelu_input_gradients(rows[0], gelu_input_RF.tensor_split(ctx.host_end_E[:-1]))
        for grad, x, gx, weight, gw, gb in zip(*rows, weight_EFD, grad_weight, grad_bias, strict=True):
            torch.mm(grad, weight, out=gx)
            torch.mm(grad.T, x, out=gw)
            torch.sum(grad, 0, out=gb)
        return grad_x, grad_weight, grad_bias, None, None


def _gelu_input_gradients(grads: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """Yields the gradient of each expert's GELU input. All share one buffer: each is valid until the next is made."""
    buffer = inputs[0].new_empty(max(x.shape[0] for x in inputs), inputs[0].shape[1])
    for grad, x in zip(grads, inputs, strict=True):
        out = buffer[: x.shape[0]]
        yield torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out)


def looped_mlp(
    x_RD: Tensor,
    weight1_EFD: Tensor,
    bias1_EF: Tensor,
    weight2_EDF: Tensor,
    bias2_ED: Tensor,
    host_end_E: list[int],
) -> Tensor:
    """Rows through the MLP of their expert, linear · tanh-GELU · linear: the result of two `LoopedLinear`.

    Products of an expert follow one another while its hidden values are in a CPU's cache, and an expert without rows
    costs none. In backward the gradients of the two matrices are made by two functions, so that the first to be ready
    can be reduced and freed before the other is made.
    """
    sizes = [end - begin for begin, end in pairwise([0, *host_end_E])]
    with torch.no_grad():
        gelu_input_RF, hidden_RF, y_RD = _outputs(x_RD, weight1_EFD, bias1_EF, weight2_EDF, bias2_ED, sizes)
    if not torch.is_grad_enabled():
        return y_RD
    y_RD = _SecondLayer.apply(y_RD, weight2_EDF, bias2_ED, hidden_RF, sizes)
    return _FirstLayer.apply(y_RD, x_RD, weight1_EFD, bias1_EF, weight2_EDF.detach(), gelu_input_RF, sizes)


def _outputs(
    x_RD: Tensor, weight1_EFD: Tensor, bias1_EF: Tensor, weight2_EDF: Tensor, bias2_ED: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of the GELU, its outputs, and the outputs of the experts, with `sizes` rows of each expert."""
    gelu, addmm = torch.ops.aten.gelu.out, torch.addmm
    R, F, D = x_RD.shape[0], bias1_EF.shape[1], bias2_ED.shape[1]
    results = x_RD.new_empty(R, F), x_RD.new_empty(R, F), x_RD.new_empty(R, D)
    rows = (tensor.split(sizes) for tensor in (x_RD, *results))
    parameters = weight1_EFD.mT.unbind(), bias1_EF.unbind(), weight2_EDF.mT.unbind(), bias2_ED.unbind()
    for size, x, gelu_input, hidden, y, w1, b1, w2, b2 in zip(sizes, *rows, *parameters, strict=True):
        if size:
            addmm(b1, x, w1, out=gelu_input)
            gelu(gelu_input, approximate="tanh", out=hidden)
            addmm(b2, hidden, w2, out=y)
    return results


class _SecondLayer(torch.autograd.Function):
    """Connects the outputs of the experts to the parameters of their second layer."""

    @staticmethod
    def forward(ctx, y_RD: Tensor, weight_EDF: Tensor, bias_ED: Tensor, hidden_RF: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(hidden_RF)
        ctx.sizes, ctx.shape = sizes, weight_EDF.shape
        return y_RD.view_as(y_RD)

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple:
        (hidden_RF,) = ctx.saved_tensors
        grad_weight, grad_bias = grad_RD.new_empty(ctx.shape), grad_RD.new_empty(ctx.shape[:2])
        rows = grad_RD.split(ctx.sizes), hidden_RF.split(ctx.sizes)
        for size, grad, hidden, *grads in zip(ctx.sizes, *rows, grad_weight.unbind(), grad_bias.unbind(), strict=True):
            _parameter_gradients(size, grad, hidden, *grads)
        return None, grad_weight, grad_bias, None, None


class _FirstLayer(torch.autograd.Function):
    """Connects the outputs of the experts to the rows and to the parameters of their first layer.

    The gradient of hidden values has a buffer of the size of the largest expert instead of all rows.
    """

    @staticmethod
    def forward(
        ctx,
        y_RD: Tensor,
        x_RD: Tensor,
        weight1_EFD: Tensor,
        bias1_EF: Tensor,
        weight2_EDF: Tensor,
        gelu_input_RF: Tensor,
        sizes: list[int],
    ) -> Tensor:
        ctx.save_for_backward(x_RD, weight1_EFD, weight2_EDF, gelu_input_RF)
        ctx.sizes = sizes
        return y_RD.view_as(y_RD)

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple:
        x_RD, weight1_EFD, weight2_EDF, gelu_input_RF = ctx.saved_tensors
        gelu_backward, mm, sizes = torch.ops.aten.gelu_backward.grad_input, torch.mm, ctx.sizes
        grad_x, grad_weight = torch.empty_like(x_RD), torch.empty_like(weight1_EFD)
        grad_bias = grad_weight.new_empty(grad_weight.shape[:2])
        buffer_RF = gelu_input_RF.new_empty(max(sizes), gelu_input_RF.shape[1])
        rows = (tensor.split(sizes) for tensor in (grad_RD, x_RD, gelu_input_RF, grad_x))
        experts = (tensor.unbind() for tensor in (weight1_EFD, weight2_EDF, grad_weight, grad_bias))
        for size, grad, x, gelu_input, gx, w1, w2, *grads in zip(sizes, *rows, *experts, strict=True):
            grad_hidden = buffer_RF[:size]
            if size:
                mm(grad, w2, out=grad_hidden)
                gelu_backward(grad_hidden, gelu_input, approximate="tanh", grad_input=grad_hidden)
                mm(grad_hidden, w1, out=gx)
            _parameter_gradients(size, grad_hidden, x, *grads)
        return grad_RD, grad_x, grad_weight, grad_bias, None, None, None


def _parameter_gradients(size: int, grad: Tensor, x: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Writes the gradients of the matrix and the bias of an expert with `size` rows."""
    if size:
        torch.mm(grad.T, x, out=grad_weight)
        torch.sum(grad, 0, out=grad_bias)
    else:
        grad_weight.zero_()
        grad_bias.zero_()
