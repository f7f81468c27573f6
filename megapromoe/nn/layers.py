"""Layers of a DiT: embeddings, attention, the MLP, modulation.

Shape letters: B images, S tokens per image, D hidden size, F expert or MLP width; in attention, H heads of width d.

Source: DiT (Peebles & Xie, arXiv 2212.09748).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapromoe.nn.activations import hidden_values
from megapromoe.nn.logical_module import LogicalModule, Normal, ParameterRule, xavier_uniform, zeros
from megapromoe.nn.norms import head_norm
from megapromoe.nn.rotary import Rotation, rotate
from megapromoe.nn.tensor_parallel import ColumnLinear, GateUpLinear, Linear, QkvLinear, RegionModule, RowLinear


def sequence_table(length: int, width: int) -> Tensor:
    """Fixed 1-D sine-cosine positions of a sequence, float32 (length, D)."""
    omega = 1.0 / 10000 ** (np.arange(width // 2, dtype=np.float64) / (width / 2))
    angle = np.arange(length)[:, None] * omega[None]
    return torch.from_numpy(np.concatenate([np.sin(angle), np.cos(angle)], axis=1)).float()


def position_table(tokens_per_side: int, width: int, scale: float = 1.0) -> Tensor:
    """Fixed 2-D sine-cosine positions, float32 (S, D): the first half of D encodes the column, the second the row.

    Args:
        tokens_per_side: of a square image.
        width: D.
        scale: factor on columns and rows.

    Source: MAE's get_2d_sincos_pos_embed, in float64 as in the original.
    """
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    row, column = np.divmod(np.arange(tokens_per_side**2), tokens_per_side)
    halves = []
    for position in (column, row):
        angle = scale * position[:, None] * omega[None]
        halves += [np.sin(angle), np.cos(angle)]
    return torch.from_numpy(np.concatenate(halves, axis=1)).float()


class PatchConvolution(LogicalModule, nn.Conv2d):
    """A convolution that starts as a linear layer on its patch does."""

    rules = {"weight": ParameterRule(xavier_uniform), "bias": ParameterRule(zeros)}


class TimeLinear(Linear):
    """A linear layer of the time embedding."""

    rules = {"weight": ParameterRule(Normal(0.02)), "bias": ParameterRule(zeros)}


class LabelTable(LogicalModule, nn.Embedding):
    """A vector for each label."""

    rules = {"weight": ParameterRule(Normal(0.02))}


class PatchEmbed(nn.Module):
    """Images (B, C, H, W) to tokens (B, S, D): a convolution with kernel = stride = patch, as one matmul."""

    def __init__(self, patch: int, channels: int, width: int):
        super().__init__()
        self.patch = patch
        self.proj = PatchConvolution(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # Contiguous, because the following layers keep this memory layout, and each LayerNorm would copy its input.
        return self.proj(x_BCHW).flatten(2).transpose(1, 2).contiguous()


class TimeEmbed(nn.Module):
    """Model time (B,) in [0, 1000] to (B, D): 256 sinusoids (cosines first, longest period 10000) and an MLP.

    Args:
        width: D.
        time_input: the input of the sinusoids at model time t: "dit" t, "repa" t / 1000, "sit" 1 - t / 1000. Time 1
            is the data in SiT; in REPA, and here, it is the noise.
        frequency_shift: frequency i of N is 10000^(-i / (N - shift)); diffusers uses 1 for DiT.
    """

    SINUSOIDS = 256

    def __init__(self, width: int, time_input: str = "dit", frequency_shift: int = 0):
        super().__init__()
        self.time_input = time_input
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(TimeLinear(self.SINUSOIDS, width), nn.SiLU(), TimeLinear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        half = self.SINUSOIDS // 2
        steps = torch.arange(half, dtype=torch.float32, device=t_B.device)
        t_B = t_B.float()
        if self.time_input != "dit":
            t_B = t_B / 1000 if self.time_input == "repa" else 1 - t_B / 1000
        angle = t_B[:, None] * torch.exp(-math.log(10000) * steps / (half - self.frequency_shift))[None]
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        return self.mlp(features.to(first.weight.dtype))


class LabelEmbed(nn.Module):
    """Class labels (B,) to (B, D). The last row, index num_classes, is the null class."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = LabelTable(num_classes + 1, width)

    def forward(self, y_B: Tensor) -> Tensor:
        return self.embedding_table(y_B)


class AttentionContext(NamedTuple):
    """What the attention of all blocks of a forward pass has in common."""

    rotation: Rotation | None = None
    """Of queries and keys, with `model.positions=rope`."""
    mask: Tensor | None = None
    """Bool, (B, 1, 1, N + S): which tokens are keys, with `model.condition=text`."""
    num_text: int = 0
    """Number N of text tokens, which precede those of the image."""
    is_activated: bool = False
    """Whether the conditions of blocks and final layer have passed their SiLU, as in compiled models."""
    is_modulation: bool = False
    """Whether the condition of a block is its own modulation (B, 6D), as in a group of compiled blocks."""


NO_CONTEXT = AttentionContext()


class Attention(RegionModule):
    """Multi-head self-attention over a sequence of tokens, x (B, S, D) -> (B, S, D). A region: tp divides the heads."""

    def __init__(self, width: int, heads: int, qk_norm: str = "none"):
        super().__init__()
        self.head_width = width // heads
        self.qkv = QkvLinear(width, 3 * width)
        self.q_norm = head_norm(qk_norm, self.head_width)
        self.k_norm = head_norm(qk_norm, self.head_width)
        self.proj = RowLinear(width, width)

    def forward(self, x_BSD: Tensor, rotation: Rotation | None = None, mask: Tensor | None = None) -> Tensor:
        """Applies attention.

        Args:
            x_BSD: tokens.
            rotation: of queries and keys, by the positions of their tokens.
            mask: bool, (B, 1, 1, S): which keys take part; None: all.
        """
        return self.proj(self.joined_heads(x_BSD, rotation, mask))

    def joined_heads(self, x_BSD: Tensor, rotation: Rotation | None, mask: Tensor | None) -> Tensor:
        """The outputs of all heads (B, S, D/tp), which `proj` mixes; the arguments are those of `forward`."""
        B, S, _ = x_BSD.shape
        qkv = self.qkv(self.region.copy_to_region(x_BSD)).view(B, S, 3, -1, self.head_width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        y_BHSd = F.scaled_dot_product_attention(q, k, v, mask)
        return y_BHSd.transpose(1, 2).reshape(B, S, -1)


class Mlp(RegionModule):
    """Linear(D→F) · tanh-GELU · Linear(F→D), or with two first layers and a SwiGLU. A region: tp divides F."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu"):
        """Makes an MLP.

        Args:
            width: D.
            hidden: F.
            activation: a value of `model.activation`.
        """
        super().__init__()
        self.activation = activation
        is_gated = activation == "swiglu"
        self.fc1 = GateUpLinear(width, 2 * hidden) if is_gated else ColumnLinear(width, hidden)
        self.fc2 = RowLinear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.hidden(self.region.copy_to_region(x)))

    # `forward` in two halves, for callers inside a region.

    def hidden(self, x: Tensor) -> Tensor:
        """Hidden values (..., F/tp) of x (..., D), after the activation."""
        return hidden_values(self.fc1(x), self.activation)

    def partial(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The partial output for hidden values, and the bias to add after the sum over ranks (or None)."""
        return self.fc2(hidden, partial=True)


class SummedMlps(nn.ModuleList):
    """Several MLPs that are applied to the same tokens; their outputs are summed."""

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (mlp(x) for mlp in self)
        return sum(others, start=first)


def modulate(x_BSD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """x·(1 + scale) + shift, one shift and scale per image. Source: DiT, adaLN."""
    return torch.addcmul(shift_BD.unsqueeze(1), x_BSD, 1 + scale_BD.unsqueeze(1))


class GatedResidual(torch.autograd.Function):
    """x + gate·(y + bias) of tokens (B, S, D), with a gate and a bias (B, D) for each image; for compiled code.

    The gradients of gate and bias both follow from two sums over the tokens of an image, Σ grad·y and Σ grad, which
    take one pass. Autograd would compute the gradient of the bias in a pass over the gradient of y.
    """

    @staticmethod
    def forward(ctx, x_BSD: Tensor, gate_BD: Tensor, y_BSD: Tensor, bias_BD: Tensor) -> Tensor:
        ctx.save_for_backward(gate_BD, y_BSD, bias_BD)
        return x_BSD + gate_BD.unsqueeze(1) * (y_BSD + bias_BD.unsqueeze(1))

    @staticmethod
    def backward(ctx, grad_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gate_BD, y_BSD, bias_BD = ctx.saved_tensors
        precision = torch.promote_types(grad_BSD.dtype, torch.float32)
        sum_BD = grad_BSD.sum(1, dtype=precision)
        grad_gate_BD = (grad_BSD.to(precision) * y_BSD).sum(1) + bias_BD * sum_BD
        grad_bias_BD = gate_BD * sum_BD
        grad_y_BSD = grad_BSD * gate_BD.unsqueeze(1)
        return grad_BSD, grad_gate_BD.to(gate_BD.dtype), grad_y_BSD, grad_bias_BD.to(bias_BD.dtype)
