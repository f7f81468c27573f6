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
    """The tanh form of GELU of each element, 0.5·x·(1 + tanh u) with u = √(2/π)·(x + 0.044715·x³).

    Source: Hendrycks & Gimpel, arXiv 1606.08415.
    """
    return CompiledGelu.apply(x) if torch.compiler.is_compiling() else F.gelu(x, approximate="tanh")


# For compiled code, which fuses these functions with what is before and after. They use 0.5·(1 + tanh u) = sigmoid(2u):
# on GPUs a tanh takes longer than the memory access of the kernel, the exponential of a sigmoid does not.
_SLOPE, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


def gelu_value(x: Tensor) -> Tensor:
    """`gelu` of a float32 or float64 tensor."""
    return x * _sigmoid_of_2u(x)


def gelu_slope(x: Tensor) -> Tensor:
    """The derivative of `gelu_value`, of the same shape."""
    sigmoid = _sigmoid_of_2u(x)
    return sigmoid + x * sigmoid * (1 - sigmoid) * (_SLOPE + 3 * _SLOPE * _CUBIC * x * x)


def _sigmoid_of_2u(x: Tensor) -> Tensor:
    return torch.sigmoid(_SLOPE * (x + _CUBIC * x * x * x))


def widened(x: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, for what an `autograd.Function` returns in compiled code.

    torch.compile of torch 2.11 loses the gradient of what it returns if that is a result of `to` with the same dtype.
    """
    return value if value.dtype == dtype else value.to(dtype)


class CompiledGelu(torch.autograd.Function):
    """`gelu` by `gelu_value` and `gelu_slope`; keeps its input only."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return rounded(gelu_value(widened(x)), x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (grad * gelu_slope(widened(x))).to(x.dtype)


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
