"""The hidden layer of an MLP or an expert: tanh-GELU, or SwiGLU."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def hidden_values(x: Tensor, activation: str) -> Tensor:
    """The hidden values (..., F) of the projected input.

    Args:
        x: (..., F) for "gelu"; (..., 2F) for "swiglu", first the gate, then what is gated.
        activation: a value of `model.activation`.
    """
    return swiglu(x) if activation == "swiglu" else gelu(x)


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU, 0.5·x·(1 + tanh u) with u = √(2/π)·(x + 0.044715·x³)."""
    return _CompiledGelu.apply(x) if torch.compiler.is_compiling() else F.gelu(x, approximate="tanh")


# For compiled code. It is written with 0.5·(1 + tanh u) = sigmoid(2u): one exponential, while the tanh of GPUs takes
# longer than the memory access of the kernel. Inductor fuses both functions with what is before and after.
_SLOPE, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


def gelu_value(x: Tensor) -> Tensor:
    """The tanh form of GELU; `x` has at least 32 bits."""
    return x * torch.sigmoid(_SLOPE * (x + _CUBIC * x * x * x))


def gelu_slope(x: Tensor) -> Tensor:
    """The derivative of `gelu_value`."""
    share = torch.sigmoid(_SLOPE * (x + _CUBIC * x * x * x))
    return share + x * share * (1 - share) * (_SLOPE + 3 * _SLOPE * _CUBIC * x * x)


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The value in a dtype, for what an `autograd.Function` returns in compiled code.

    torch.compile of torch 2.11 loses the gradient of a result of `to` that is its input.
    """
    return value if value.dtype == dtype else value.to(dtype)


class _CompiledGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return rounded(gelu_value(x.to(torch.promote_types(x.dtype, torch.float32))), x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (grad * gelu_slope(x.to(torch.promote_types(x.dtype, torch.float32)))).to(x.dtype)


def swiglu(x: Tensor) -> Tensor:
    """SiLU(gate)·up of (..., 2F) = [gate | up], shape (..., F). Source: GLU Variants (Shazeer, arXiv 2002.05202)."""
    if torch.compiler.is_compiling():  # it chooses itself what to save, and fuses the products
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    """Saves its input only; autograd would save the SiLU as well, which has half as many elements."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        (gate, up), grad_x = x.chunk(2, dim=-1), torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_x
