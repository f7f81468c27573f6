"""Linear layers and the region they live in: what tensor parallelism needs from a model, and nothing more.

A *region* is a stretch of the model whose ranks each do a part of the work on the same input: heads of the attention,
columns of an MLP, rows of the MoE. `enter` copies the input in (backward sums the parts' gradients), `leave` sums the
partial outputs. Without tensor parallelism both are the identity, so the model is written once. `parallelize.py` hands
out the regions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapromoe.parallel.collectives import copy_to, gather_last, reduce_from
from megapromoe.parallel.mesh import Group


@dataclass(frozen=True)
class Region:
    """A stretch of the model shared out over `group` (None: not shared out).

    Source: the conjugate operators f and g of Megatron-LM (arXiv 1909.08053, section 3).
    """

    group: Group | None = None

    @property
    def shared(self) -> bool:
        return self.group is not None and self.group.size > 1

    @property
    def size(self) -> int:
        return self.group.size if self.shared else 1

    @property
    def rank(self) -> int:
        return self.group.rank if self.shared else 0

    def enter(self, x: Tensor) -> Tensor:
        return copy_to(x, self.group) if self.shared else x

    def leave(self, partial: Tensor) -> Tensor:
        return reduce_from(partial, self.group) if self.shared else partial

    def gather(self, x: Tensor) -> Tensor:
        """Joins slices of the last dimension."""
        return gather_last(x, self.group) if self.shared else x


WHOLE = Region()


class ColumnLinear(nn.Linear):
    """Linear whose output features are shared out: x (..., in) -> (..., out/tp). Inside a region."""


class RowLinear(nn.Linear):
    """Linear whose input features are shared out. Ends a region.

    `forward(x (..., in/tp))` returns the whole output (..., out). `partial` leaves the sum over ranks, and the bias, to
    the caller, who merges several layers into one sum.
    """

    region: Region = WHOLE

    def forward(self, x: Tensor, partial: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        if not self.region.shared:
            y = F.linear(x, self.weight, self.bias)
            return (y, None) if partial else y
        y = F.linear(x, self.weight)
        # A clone, because ZeRO-3 takes a parameter away when its module's forward returns.
        return (y, self.bias.clone()) if partial else self.region.leave(y) + self.bias


class GatheredLinear(nn.Linear):
    """Linear whose output features are computed in slices and joined: x (..., in) -> (..., out) on every rank."""

    region: Region = WHOLE

    def forward(self, x: Tensor) -> Tensor:
        return self.region.gather(F.linear(self.region.enter(x), self.weight, self.bias))


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

    def forward(self, x_RD: Tensor, offs_E: Tensor, expert_R: Tensor) -> Tensor:
        """Rows sorted by expert, through their expert.

        Args:
            x_RD: rows (R, in), sorted by expert; R may be 0.
            offs_E: int32 (experts,), the row after each expert's last.
            expert_R: int64 (R,), each row's expert.

        Returns:
            rows (R, out).

        Source: torch.nn.functional.grouped_mm.
        """
        bias = self.bias
        if self.closes and self.region.shared:
            bias = self.region.enter(bias) / self.region.size
        return _GroupedLinear.apply(x_RD, self.weight, bias, offs_E, expert_R, self.finish, self.gelu)


# What follows a grouped product, pass by pass; `models.compiled` makes one pass of it. Both write into the product.


def add_bias(y_RF: Tensor, bias_EF: Tensor, expert_R: Tensor) -> Tensor:
    """Rows (R, F) plus their expert's bias."""
    return y_RF.add_(bias_EF.index_select(0, expert_R))


def add_bias_gelu(y_RF: Tensor, bias_EF: Tensor, expert_R: Tensor) -> Tensor:
    """The tanh-GELU of `add_bias`, which `y_RF` then holds."""
    return F.gelu(add_bias(y_RF, bias_EF, expert_R), approximate="tanh")


class _GroupedLinear(torch.autograd.Function):
    """Each row times its expert's matrix, plus its bias, and the GELU of it if asked: rows sorted by expert.

    Written out because autograd's version takes twice the passes over the rows: it adds a gathered copy of the biases
    to a copy of the product, and grouped_mm's backward wants contiguous gradients, which autograd does not promise.
    Without rows the parameters get gradients of zero, and in the same order: ranks that disagree on the order in which
    gradients come would reduce different ones together.
    """

    @staticmethod
    def forward(ctx, x_RD, weight_EFD, bias_EF, offs_E, expert_R, finish, gelu):
        if not x_RD.shape[0]:  # which grouped_mm refuses in backward
            ctx.save_for_backward(x_RD, weight_EFD, offs_E, None)
            return x_RD.new_empty(0, weight_EFD.shape[1])
        y_RF = F.grouped_mm(x_RD, weight_EFD.transpose(1, 2), offs=offs_E)
        out_RF = finish(y_RF, bias_EF, expert_R)
        ctx.save_for_backward(x_RD, weight_EFD, offs_E, y_RF if gelu else None)
        return out_RF

    @staticmethod
    def backward(ctx, grad_RF):
        x_RD, weight_EFD, offs_E, before_gelu_RF = ctx.saved_tensors
        grad_RF = grad_RF.contiguous()
        grad_x = grad_weight = grad_bias = None
        if not x_RD.shape[0]:
            return (
                torch.zeros_like(x_RD),
                torch.zeros_like(weight_EFD),
                weight_EFD.new_zeros(weight_EFD.shape[:2]),
                *[None] * 4,
            )
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
        return grad_x, grad_weight, grad_bias, *[None] * 4
