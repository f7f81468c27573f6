"""Normalisation of tokens, and of the queries and keys of attention heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapromoe.nn.logical_module import ParameterRule, ones, zeros
from megapromoe.nn.tensor_parallel import RegionModule


def token_norm(kind: str, width: int, eps: float = 1e-6) -> nn.Module:
    """The normalisation of tokens before a modulation, without parameters; `kind` is a value of `model.norm`."""
    if kind == "rms":
        return TokenRMSNorm(width, eps=eps, elementwise_affine=False)
    return nn.LayerNorm(width, elementwise_affine=False, eps=eps)


def head_norm(kind: str, head_width: int) -> nn.Module:
    """The normalisation of queries or keys; `kind` is a value of `model.qk_norm`."""
    if kind == "none":
        return nn.Identity()
    return HeadRMSNorm(head_width, eps=1e-6) if kind == "rms" else HeadNorm(head_width)


class HeadNorm(RegionModule, nn.LayerNorm):
    """LayerNorm over the channels of one head, with the same weights for every head; tp divides the heads."""

    rules = {"weight": ParameterRule(ones), "bias": ParameterRule(zeros)}

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.region.copy_to_region(self.weight), self.region.copy_to_region(self.bias)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class HeadRMSNorm(RegionModule, nn.RMSNorm):
    """RMSNorm over the channels of one head, with the same weights for every head; tp divides the heads."""

    rules = {"weight": ParameterRule(ones)}
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.region.copy_to_region(self.weight), self.eps)


class TokenRMSNorm(nn.RMSNorm):
    """RMSNorm over the channels of a token, without parameters."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, None, self.eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / √(mean(x²) + eps), times the weight, over the last dimension; computed in float32 or better.

    Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    if x.is_cuda or torch.compiler.is_compiling():  # one kernel
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Saves what the kernel of GPUs does: its input and one number for each row. Torch's operators save more."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(torch.linalg.vector_norm(precise, dim=-1, keepdim=True).square_() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, scale)
        y = torch.mul(precise, scale, out=precise.new_empty(x.shape))  # contiguous, as the kernel of GPUs makes it
        return (y if weight is None else y.mul_(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normalised, grad_weight = x * scale, None
        grad_y = grad.to(scale.dtype)
        if weight is not None:
            grad_weight = (grad_y * normalised).flatten(0, -2).sum(0).to(weight.dtype)
            grad_y = grad_y * weight
        mean = (grad_y * normalised).mean(-1, keepdim=True)
        return ((grad_y - normalised * mean) * scale).to(x.dtype), grad_weight, None
