"""The routed experts, and their linear layers: a matrix for each expert, applied to rows that are sorted by expert.

There are two implementations with the same result:

* *grouped*, on devices where torch's grouped product is a single kernel (`has_grouped_mm_kernel`). It launches nothing
  for each expert, and the host does not need the number of rows of each expert.
* *looped*, on other devices. There torch's grouped product is itself a loop that waits for the row counts at each
  product and cannot add a bias. The loop (`looped_experts.py`) uses counts that were read once for the layer, adds the
  bias within the product, and applies the GELU to each expert's output while it is still in a CPU's cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapromoe.distributed.mesh import Mesh
from megapromoe.distributed.parameter_layout import Split
from megapromoe.nn.activations import swiglu
from megapromoe.nn.logical_module import LogicalModule, ParameterRule, xavier_uniform, xavier_uniform_halves, zeros
from megapromoe.nn.moe.expert_operators import TracedExperts, offsets_on_host
from megapromoe.nn.moe.looped_experts import LoopedLinear, looped_mlp
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


ExpertParameters = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weight and bias of both layers of some experts, (experts, ...) each."""


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

    rules = {
        "weight": ParameterRule(xavier_uniform, Split(1), hidden_matrices=1),
        "bias": ParameterRule(zeros, Split(1)),
    }
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
        return self.products(x_RD, *self.parameters_in(x_RD.dtype), offsets)

    def products(self, x_RD: Tensor, weight: Tensor, bias: Tensor | None, offsets: ExpertOffsets) -> Tensor:
        """`forward` with the parameters of any experts, as `parameters_in` returns those of this rank.

        `bias`: may be None in compiled code.
        """
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
        return LoopedLinear.apply(x_RD, weight, bias, offsets.host_end_E, self.gelu)

    def parameters_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias as this rank computes with them, in the dtype of the rows."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if weight.dtype != dtype:  # under autocast, which does not know our functions
            weight, bias = weight.to(dtype), bias.to(dtype)
        if self.is_down_projection and self.region.is_sharded:
            bias = self.region.copy_to_region(bias) / self.region.size
        return weight, bias

    @property
    def is_plain(self) -> bool:
        """Whether calling this module does nothing but its `forward`: another module may compute in its place.

        Sharding libraries fetch the parameters in hooks, and subclasses or a replaced `forward` compute something else.
        """
        hooks = self._forward_pre_hooks, self._forward_hooks, self._backward_pre_hooks, self._backward_hooks
        return type(self) in (ExpertLinear, ExpertDownLinear) and "forward" not in vars(self) and not any(hooks)


class ExpertGateUpLinear(ExpertLinear):
    """The two projections of each expert's SwiGLU in one layer, [gate | up]."""

    rules = {
        "weight": ParameterRule(xavier_uniform_halves, Split(1, blocks=2), hidden_matrices=2),
        "bias": ParameterRule(zeros, Split(1, blocks=2)),
    }


class ExpertDownLinear(ExpertLinear):
    """The last linear layer of each expert, whose input features tensor parallelism divides."""

    rules = {"weight": ParameterRule(xavier_uniform, Split(2), hidden_matrices=1), "bias": ParameterRule(zeros)}
    is_down_projection = True


class Experts(nn.Module):
    """The routed experts of one rank, each an MLP as `Mlp` is, with stacked parameters."""

    def __init__(self, experts: int, width: int, hidden: int, activation: str = "gelu"):
        super().__init__()
        self.is_swiglu = activation == "swiglu"
        if self.is_swiglu:
            self.fc1: ExpertLinear = ExpertGateUpLinear(experts, width, 2 * hidden)
        else:
            self.fc1 = ExpertLinear(experts, width, hidden, gelu=True)
        self.fc2 = ExpertDownLinear(experts, hidden, width)

    def forward(self, x_RD: Tensor, offsets: ExpertOffsets) -> Tensor:
        """Rows (R, D) sorted by expert -> (R, D); see `ExpertLinear`."""
        if isinstance(offsets.host_end_E, list) and self._runs_at_once(x_RD):
            return looped_mlp(x_RD, *self.parameters_in(x_RD.dtype), offsets.host_end_E)
        hidden_RF = self.fc1(x_RD, offsets)
        return self.fc2(swiglu(hidden_RF) if self.is_swiglu else hidden_RF, offsets)

    def without_last_bias(self, x_RD: Tensor, offsets: ExpertOffsets) -> tuple[Tensor, Tensor | None]:
        """`forward` without the biases of the last layer, and these (experts, D), for compiled code that adds them.

        The biases are None if the output contains them.
        """
        if not self.fc2.is_plain:
            return self(x_RD, offsets), None
        weight, bias = self.fc2.parameters_in(x_RD.dtype)
        hidden_RF = self.fc1(x_RD, offsets)
        return self.fc2.products(swiglu(hidden_RF) if self.is_swiglu else hidden_RF, weight, None, offsets), bias

    def parameters_in(self, dtype: torch.dtype) -> ExpertParameters:
        """Weight and bias of both layers, see `ExpertLinear.parameters_in`."""
        return *self.fc1.parameters_in(dtype), *self.fc2.parameters_in(dtype)

    def products(self, x_RD: Tensor, parameters: ExpertParameters, offsets: ExpertOffsets) -> Tensor:
        """`forward` with the parameters of any experts, as `parameters_in` returns those of this rank."""
        if isinstance(offsets.host_end_E, list) and self._runs_at_once(x_RD):
            return looped_mlp(x_RD, *parameters, offsets.host_end_E)
        weight1, bias1, weight2, bias2 = parameters
        hidden_RF = self.fc1.products(x_RD, weight1, bias1, offsets)
        return self.fc2.products(swiglu(hidden_RF) if self.is_swiglu else hidden_RF, weight2, bias2, offsets)

    def _runs_at_once(self, x_RD: Tensor) -> bool:
        """Whether one function computes both layers, with the same result, instead of a call of each."""
        is_looped = not torch.compiler.is_compiling() and not has_grouped_mm_kernel(x_RD)
        return is_looped and not self.is_swiglu and self.fc1.is_plain and self.fc2.is_plain


class _GroupedExperts(torch.autograd.Function):
    """`LoopedLinear` by grouped products; it too has a handwritten backward and returns gradients of zero."""

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
