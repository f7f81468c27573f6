"""Linear layers and MLPs of experts by a loop over the experts, for devices without a kernel of grouped products.

Rows are sorted by expert, and how many each expert has is known on the host. Every product writes into its part of one
tensor. Both functions have a handwritten backward, because autograd's passes over the rows more often. Both return
gradients of zero for an expert without rows, not None: ZeRO reduces gradients in the order in which they are ready, and
ranks with different orders would reduce different gradients together.
"""

from __future__ import annotations

from collections.abc import Iterator

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


class LoopedMlp(torch.autograd.Function):
    """Rows through the MLP of their expert, linear · tanh-GELU · linear: the products of two `LoopedLinear`.

    All products of an expert follow one another, while its hidden values are in a CPU's cache. Their gradient has a
    buffer of the size of the largest expert instead of all rows. An expert without rows costs no product.
    """

    @staticmethod
    def forward(
        ctx,
        x_RD: Tensor,
        weight1_EFD: Tensor,
        bias1_EF: Tensor,
        weight2_EDF: Tensor,
        bias2_ED: Tensor,
        host_end_E: list[int],
    ) -> Tensor:
        gelu, addmm = torch.ops.aten.gelu.out, torch.addmm
        R = x_RD.shape[0]
        input_RF, hidden_RF = x_RD.new_empty(R, bias1_EF.shape[1]), x_RD.new_empty(R, bias1_EF.shape[1])
        y_RD = x_RD.new_empty(R, bias2_ED.shape[1])
        sizes = _sizes(host_end_E)
        rows = (tensor.split(sizes) for tensor in (x_RD, input_RF, hidden_RF, y_RD))
        parameters = weight1_EFD.mT.unbind(), bias1_EF.unbind(), weight2_EDF.mT.unbind(), bias2_ED.unbind()
        for size, x, gelu_input, hidden, y, w1, b1, w2, b2 in zip(sizes, *rows, *parameters, strict=True):
            if size:
                addmm(b1, x, w1, out=gelu_input)
                gelu(gelu_input, approximate="tanh", out=hidden)
                addmm(b2, hidden, w2, out=y)
        ctx.save_for_backward(x_RD, weight1_EFD, weight2_EDF, input_RF, hidden_RF)
        ctx.sizes = sizes
        return y_RD

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple:
        x_RD, weight1_EFD, weight2_EDF, input_RF, hidden_RF = ctx.saved_tensors
        gelu_backward, mm, sizes = torch.ops.aten.gelu_backward.grad_input, torch.mm, ctx.sizes
        grad_x = torch.empty_like(x_RD)
        grad_weights = torch.empty_like(weight1_EFD), torch.empty_like(weight2_EDF)
        grad_biases = [weight.new_empty(weight.shape[:2]) for weight in grad_weights]
        buffer_RF = input_RF.new_empty(max(sizes), input_RF.shape[1])
        rows = (tensor.split(sizes) for tensor in (grad_RD, x_RD, input_RF, hidden_RF, grad_x))
        experts = (tensor.unbind() for tensor in (weight1_EFD, weight2_EDF, *grad_weights, *grad_biases))
        for size, grad, x, gelu_input, hidden, gx, w1, w2, *grads in zip(sizes, *rows, *experts, strict=True):
            if not size:
                torch._foreach_zero_(grads)
                continue
            gw1, gw2, gb1, gb2 = grads
            grad_hidden = buffer_RF if size == buffer_RF.shape[0] else buffer_RF[:size]
            mm(grad, w2, out=grad_hidden)
            mm(grad.T, hidden, out=gw2)
            torch.sum(grad, 0, out=gb2)
            gelu_backward(grad_hidden, gelu_input, approximate="tanh", grad_input=grad_hidden)
            mm(grad_hidden, w1, out=gx)
            mm(grad_hidden.T, x, out=gw1)
            torch.sum(grad_hidden, 0, out=gb1)
        return grad_x, grad_weights[0], grad_biases[0], grad_weights[1], grad_biases[1], None


def _sizes(host_end_E: list[int]) -> list[int]:
    """The number of rows of each expert, from the index after its last row."""
    return [end - begin for begin, end in zip([0, *host_end_E], host_end_E, strict=False)]
