"""The hidden layer of an MLP or an expert: tanh-GELU, or SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def hidden_values(x: Tensor, activation: str) -> Tensor:
    """The hidden values (..., F) of the projected input.

    Args:
        x: (..., F) for "gelu"; (..., 2F) for "swiglu", first the gate, then what is gated.
        activation: a value of `model.activation`.
    """
    return swiglu(x) if activation == "swiglu" else F.gelu(x, approximate="tanh")


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
