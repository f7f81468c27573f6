"""The linear layers of experts: a matrix for each expert, over rows that are sorted by expert.

Two ways to the same numbers:

* *grouped*, where torch's grouped product is one kernel (`in_one_kernel`): no work for each expert, and the host need
  not know how many rows an expert got.
* *expert by expert* elsewhere, where torch's grouped product is a loop itself, which waits for these numbers at each
  product and knows no bias. Ours has them read once for a layer, adds the bias within the product, and passes on to
  the GELU what is still in a CPU's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapromoe.nn.tensor_parallel import WHOLE, Region


class Segments(NamedTuple):
    """Where the rows of each expert are, among rows sorted by expert."""

    expert_R: Tensor
    """int64 (R,): each row's expert."""
    offs_E: Tensor
    """int32 (experts,): the row after each expert's last."""
    ends_E: list[int] | None
    """The same on the host; None if nobody asks, see `in_one_kernel`."""


def in_one_kernel(x: Tensor) -> bool:
    """Whether torch has a grouped product of such rows that is one kernel: bf16 on compute capability 9 and 10.

    So for tensors without values (meta), which no loop could read. Source: torch.nn.functional.grouped_mm.
    """
    if x.is_cuda:
        return x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
    return x.is_meta


def leaves_empty_groups(x: Tensor) -> bool:
    """Whether that kernel leaves the gradient of an expert without rows as it finds the memory.

    So on GPUs of compute capability 10; those of 9 write zeros. Source: pytorch issue 172439.
    """
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 10


class ExpertLinear(nn.Module):
    """One linear layer for each expert this rank holds: weight (experts, out, in), bias (experts, out).

    With `gelu` its output goes through a tanh-GELU. `closes` marks the layer that ends an expert. If experts are split
    over tp its output is a partial sum (and its bias, of which every rank holds a copy, is shared out evenly).
    """

    region: Region = WHOLE

    def __init__(self, experts: int, d_in: int, d_out: int, gelu: bool = False, closes: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, d_out, d_in))
        self.bias = nn.Parameter(torch.empty(experts, d_out))
        self.gelu, self.closes = gelu, closes
        self.finish = add_bias_gelu if gelu else add_bias

    def forward(self, x_RD: Tensor, segments: Segments) -> Tensor:
        """Rows (R, in), sorted by expert, through their expert: (R, out). R may be 0."""
        bias: Tensor = self.bias
        if self.closes and self.region.shared:
            bias = self.region.enter(bias) / self.region.size
        if in_one_kernel(x_RD):
            return _Grouped.apply(x_RD, self.weight, bias, segments, self.finish, self.gelu)
        return _ExpertByExpert.apply(x_RD, self.weight, bias, segments.ends_E, self.gelu)


# What follows a grouped product, pass by pass; `models.compiled` makes one pass of it. Both write into the product.


def add_bias(y_RF: Tensor, bias_EF: Tensor, expert_R: Tensor) -> Tensor:
    """Rows (R, F) plus their expert's bias."""
    return y_RF.add_(bias_EF.index_select(0, expert_R))


def add_bias_gelu(y_RF: Tensor, bias_EF: Tensor, expert_R: Tensor) -> Tensor:
    """The tanh-GELU of `add_bias`, which `y_RF` then holds."""
    return F.gelu(add_bias(y_RF, bias_EF, expert_R), approximate="tanh")


# Both functions are written out, for autograd's versions take more passes over the rows, and both give an expert
# without rows gradients of zero: ranks that disagree on the order in which gradients come would reduce different ones
# together.


class _Grouped(torch.autograd.Function):
    """Each row times its expert's matrix, plus its bias, and the GELU of it if asked."""

    @staticmethod
    def forward(
        ctx, x_RD: Tensor, weight_EFD: Tensor, bias_EF: Tensor, segments: Segments, finish: Callable, gelu: bool
    ) -> Tensor:
        expert_R, offs_E, _ = segments
        if not x_RD.shape[0]:  # which grouped_mm refuses in backward
            ctx.save_for_backward(x_RD, weight_EFD, offs_E, None)
            return x_RD.new_empty(0, weight_EFD.shape[1])
        y_RF = F.grouped_mm(x_RD, weight_EFD.transpose(1, 2), offs=offs_E)
        out_RF = finish(y_RF, bias_EF, expert_R)
        ctx.save_for_backward(x_RD, weight_EFD, offs_E, y_RF if gelu else None)
        return out_RF

    @staticmethod
    def backward(ctx, grad_RF: Tensor) -> tuple:
        x_RD, weight_EFD, offs_E, before_gelu_RF = ctx.saved_tensors
        grad_RF = grad_RF.contiguous()  # which grouped_mm wants and autograd does not promise
        grad_x = grad_weight = grad_bias = None
        if not x_RD.shape[0]:
            grad_bias = weight_EFD.new_zeros(weight_EFD.shape[:2])
            return torch.zeros_like(x_RD), torch.zeros_like(weight_EFD), grad_bias, None, None, None
        if before_gelu_RF is not None:
            grad_RF = torch.ops.aten.gelu_backward(grad_RF, before_gelu_RF, approximate="tanh")
        if ctx.needs_input_grad[0]:
            grad_x = F.grouped_mm(grad_RF, weight_EFD, offs=offs_E)
        if ctx.needs_input_grad[1]:
            grad_weight = F.grouped_mm(grad_RF.T, x_RD, offs=offs_E)
        if ctx.needs_input_grad[2]:
            # A product, for adding by index rounds at each row and is not reproducible on GPUs. Of eight equal rows,
            # since grouped_mm wants 16 bytes beside each other.
            ones_8R = grad_RF.new_ones(grad_RF.shape[0], 8).T
            grad_bias = F.grouped_mm(ones_8R, grad_RF, offs=offs_E)[:, 0]
        if leaves_empty_groups(x_RD):
            empty_E = offs_E.diff(prepend=offs_E.new_zeros(1)) == 0
            for grad in (grad_weight, grad_bias):
                if grad is not None:
                    grad.masked_fill_(empty_E.view(-1, *[1] * (grad.dim() - 1)), 0)
        return grad_x, grad_weight, grad_bias, None, None, None


class _ExpertByExpert(torch.autograd.Function):
    """The same as a loop over experts, each writing its part of what is made once for all."""

    @staticmethod
    def forward(ctx, x_RD: Tensor, weight_EFD: Tensor, bias_EF: Tensor, ends_E: list[int], gelu: bool) -> Tensor:
        y_RF = x_RD.new_empty(x_RD.shape[0], weight_EFD.shape[1])
        out_RF = torch.empty_like(y_RF) if gelu else y_RF
        rows = (tensor.tensor_split(ends_E[:-1]) for tensor in (x_RD, y_RF, out_RF))
        for x, y, out, weight, bias in zip(*rows, weight_EFD, bias_EF, strict=True):
            torch.addmm(bias, x, weight.T, out=y)
            if gelu:
                torch.ops.aten.gelu.out(y, approximate="tanh", out=out)
        ctx.save_for_backward(x_RD, weight_EFD, y_RF if gelu else None)
        ctx.ends_E = ends_E
        return out_RF

    @staticmethod
    def backward(ctx, grad_RF: Tensor) -> tuple:
        x_RD, weight_EFD, before_gelu_RF = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x_RD), torch.empty_like(weight_EFD)
        grad_bias = weight_EFD.new_empty(weight_EFD.shape[:2])
        rows = [tensor.tensor_split(ctx.ends_E[:-1]) for tensor in (grad_RF, x_RD, grad_x)]
        if before_gelu_RF is not None:
            rows[0] = _before_gelu(rows[0], before_gelu_RF.tensor_split(ctx.ends_E[:-1]))
        for grad, x, gx, weight, gw, gb in zip(*rows, weight_EFD, grad_weight, grad_bias, strict=True):
            torch.mm(grad, weight, out=gx)
            torch.mm(grad.T, x, out=gw)
            torch.sum(grad, 0, out=gb)
        return grad_x, grad_weight, grad_bias, None, None


def _before_gelu(grads: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """The gradients of each expert's `inputs` of the GELU, one after the other in the same memory."""
    space = inputs[0].new_empty(max(x.shape[0] for x in inputs), inputs[0].shape[1])
    for grad, x in zip(grads, inputs, strict=True):
        out = space[: x.shape[0]]
        yield torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out)
