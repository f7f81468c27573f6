"""Linear layers of experts: a weight matrix for each expert, applied to rows that are sorted by expert.

There are two implementations with the same result:

* *grouped*, on devices where torch's grouped product is a single kernel (`has_grouped_mm_kernel`). It launches nothing
  for each expert, and the host does not need the number of rows of each expert.
* *looped*, on other devices. There torch's grouped product is itself a loop that waits for the row counts at each
  product and cannot add a bias. This loop uses counts that were read once for the layer, adds the bias within the
  product, and applies the GELU to each expert's output while it is still in a CPU's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapromoe.distributed.mesh import Mesh
from megapromoe.distributed.parameter_layout import Split
from megapromoe.nn.logical_module import LogicalModule, ParameterRule, xavier_uniform, xavier_uniform_halves, zeros
from megapromoe.nn.moe.expert_operators import TracedExperts, offsets_on_host
from megapromoe.nn.tensor_parallel import NO_TENSOR_PARALLEL, Region


class ExpertOffsets(NamedTuple):
    """Where the rows of each expert are, among rows sorted by expert."""

    expert_R: Tensor
    """The expert of each row, int64 (R,)."""
    end_E: Tensor
    """The index after the last row of each expert, int32 (experts,)."""
    host_end_E: list[int] | Tensor | None
    """`end_E` on the host, for looped experts; None where they are grouped. A tensor if it enters a compiled graph, to
    which it is no constant."""


def has_grouped_mm_kernel(x: Tensor) -> bool:
    """Whether torch's grouped product of rows like `x` is a single kernel: bf16 on compute capability 9 and 10.

    Also true for meta tensors, which the looped implementation cannot run. Source: torch.nn.functional.grouped_mm.
    """
    if x.is_cuda:
        return x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
    return x.is_meta


def grouped_mm_skips_empty_groups(x: Tensor) -> bool:
    """Whether that kernel leaves the gradient of an expert without rows uninitialised.

    True on GPUs of compute capability 10; on those of 9 it writes zeros. Source: pytorch issue 172439.
    """
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 10


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the device of x; None if autocast is off."""
    device = x.device.type
    # Not torch.amp.is_autocast_available: torch.compile of torch 2.11 cannot trace it.
    is_enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_enabled else None


def expert_precision(x: Tensor) -> Tensor:
    """The tensor in the precision in which experts compute: that of autocast, if it is on."""
    dtype = autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


class ExpertLinear(LogicalModule):
    """One linear layer for each expert of this rank: weight (experts, out, in), bias (experts, out).

    If experts are split over tp, the output of the down projection is a partial sum; its bias, which is replicated, is
    divided by the number of ranks.
    """

    rules = {"weight": ParameterRule(xavier_uniform, Split(1)), "bias": ParameterRule(zeros, Split(1))}
    has_experts = True
    is_down_projection = False
    region: Region = NO_TENSOR_PARALLEL

    def __init__(self, experts: int, d_in: int, d_out: int, gelu: bool = False):
        """Makes a layer.

        Args:
            experts: number of experts of this rank.
            d_in: input width.
            d_out: output width.
            gelu: apply a tanh-GELU to the output.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, d_out, d_in))
        self.bias = nn.Parameter(torch.empty(experts, d_out))
        self.gelu = gelu
        self.reset_parameters()

    def set_mesh(self, mesh: Mesh) -> None:
        self.region = Region(mesh.tp) if mesh.expert_tp else NO_TENSOR_PARALLEL

    def forward(self, x_RD: Tensor, offsets: ExpertOffsets) -> Tensor:
        """Applies to each row (R, in), sorted by expert, the layer of its expert: (R, out). R may be 0."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if weight.dtype != x_RD.dtype:  # under autocast, which does not know our functions
            weight, bias = weight.to(x_RD.dtype), bias.to(x_RD.dtype)
        if self.is_down_projection and self.region.is_sharded:
            bias = self.region.copy_to_region(bias) / self.region.size
        if torch.compiler.is_compiling():
            grouped, skips_empty = has_grouped_mm_kernel(x_RD), grouped_mm_skips_empty_groups(x_RD)
            if grouped:
                end_E = offsets.end_E
            elif isinstance(offsets.host_end_E, Tensor):
                end_E = offsets.host_end_E
            else:
                end_E = offsets_on_host(offsets.end_E)  # one copy for both layers
            arguments = offsets.expert_R, end_E, grouped, skips_empty, self.gelu
            return TracedExperts.apply(x_RD, weight, bias, *arguments)
        if has_grouped_mm_kernel(x_RD):
            return _GroupedExperts.apply(x_RD, weight, bias, offsets, self.gelu)
        return _LoopedExperts.apply(x_RD, weight, bias, offsets.host_end_E, self.gelu)


class ExpertGateUpLinear(ExpertLinear):
    """The two projections of each expert's SwiGLU in one layer, [gate | up]."""

    rules = {
        "weight": ParameterRule(xavier_uniform_halves, Split(1, blocks=2)),
        "bias": ParameterRule(zeros, Split(1, blocks=2)),
    }


class ExpertDownLinear(ExpertLinear):
    """The last linear layer of each expert, whose input features tensor parallelism divides."""

    rules = {"weight": ParameterRule(xavier_uniform, Split(2)), "bias": ParameterRule(zeros)}
    is_down_projection = True


# Both functions have a handwritten backward, because autograd's passes over the rows more often. Both return gradients
# of zero for an expert without rows, not None: ZeRO reduces gradients in the order in which they are ready, and ranks
# with different orders would reduce different gradients together.


class _GroupedExperts(torch.autograd.Function):
    """Rows times the matrix of their expert, plus its bias, optionally through a GELU; by grouped products."""

    @staticmethod
    def forward(ctx, x_RD: Tensor, weight_EFD: Tensor, bias_EF: Tensor, offsets: ExpertOffsets, gelu: bool) -> Tensor:
        end_E = offsets.end_E
        if not x_RD.shape[0]:  # grouped_mm refuses to differentiate a product without rows
            ctx.save_for_backward(x_RD, weight_EFD, end_E, None)
            return x_RD.new_empty(0, weight_EFD.shape[1])
        y_RF = F.grouped_mm(x_RD, weight_EFD.transpose(1, 2), offs=end_E)
        y_RF.add_(bias_EF.index_select(0, offsets.expert_R))
        ctx.save_for_backward(x_RD, weight_EFD, end_E, y_RF if gelu else None)
        return F.gelu(y_RF, approximate="tanh") if gelu else y_RF

    @staticmethod
    def backward(ctx, grad_RF: Tensor) -> tuple:
        x_RD, weight_EFD, end_E, gelu_input_RF = ctx.saved_tensors
        grad_RF = grad_RF.contiguous()  # grouped_mm requires it, autograd does not guarantee it
        grad_x = grad_weight = grad_bias = None
        if not x_RD.shape[0]:
            grad_bias = weight_EFD.new_zeros(weight_EFD.shape[:2])
            return torch.zeros_like(x_RD), torch.zeros_like(weight_EFD), grad_bias, None, None
        if gelu_input_RF is not None:
            grad_RF = torch.ops.aten.gelu_backward(grad_RF, gelu_input_RF, approximate="tanh")
        if ctx.needs_input_grad[0]:
            grad_x = F.grouped_mm(grad_RF, weight_EFD, offs=end_E)
        if ctx.needs_input_grad[1]:
            grad_weight = F.grouped_mm(grad_RF.T, x_RD, offs=end_E)
        if ctx.needs_input_grad[2]:
            # A product with eight rows of ones. Unlike index_add it is deterministic on GPUs and rounds only once. One
            # row would do, but grouped_mm needs strides that are multiples of 16 bytes: eight bf16 numbers.
            ones_8R = grad_RF.new_ones(grad_RF.shape[0], 8).T
            grad_bias = F.grouped_mm(ones_8R, grad_RF, offs=end_E)[:, 0]
        if grouped_mm_skips_empty_groups(x_RD):
            empty_E = end_E.diff(prepend=end_E.new_zeros(1)) == 0
            for grad in (grad_weight, grad_bias):
                if grad is not None:
                    grad.masked_fill_(empty_E.view(-1, *[1] * (grad.dim() - 1)), 0)
        return grad_x, grad_weight, grad_bias, None, None


class _LoopedExperts(torch.autograd.Function):
    """The same by a loop over experts, each of which writes its rows of one output tensor."""

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
