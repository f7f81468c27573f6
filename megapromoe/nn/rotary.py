"""Rotary positions: the queries and keys of a head are rotated by angles that grow with the position of the token.

Channels i and i + d/2 of a head of width d form a pair, which rotates in its own plane. Scores then depend on the
differences of positions only. The pairs of an image's tokens are divided: the first half rotates by column, the second
by row.

Source: RoFormer (Su et al., arXiv 2104.09864); for images, EVA-02 (arXiv 2303.11331).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LONGEST_PERIOD = 10000.0  # over 2π, in positions


class Rotation(NamedTuple):
    """Cosines and sines of the angles of each token's pairs, (S, d/2), float32."""

    cos: Tensor
    sin: Tensor


def image_angles(tokens_per_side: int, head_width: int, device: torch.device, scale: float = 1.0) -> Tensor:
    """Angles (S, d/2) of the tokens of a square image, row by row; float64.

    Args:
        tokens_per_side: of the image.
        head_width: d, a multiple of 4.
        device: of the result.
        scale: factor on rows and columns.
    """
    place = torch.arange(tokens_per_side**2, device=device)
    row, column = place // tokens_per_side, place % tokens_per_side
    angle_S = torch.cat([_angles(column, head_width // 4), _angles(row, head_width // 4)], dim=1)
    return angle_S if scale == 1 else scale * angle_S


def sequence_angles(length: int, head_width: int, device: torch.device) -> Tensor:
    """Angles (N, d/2) of the tokens of a text, whose pairs all rotate by its one position; float64."""
    return _angles(torch.arange(length, device=device), head_width // 2)


def rotation_of(angle_S: Tensor) -> Rotation:
    """The rotation by angles (S, d/2)."""
    return Rotation(angle_S.cos().float(), angle_S.sin().float())


def rotate(x_BHSd: Tensor, rotation: Rotation) -> Tensor:
    """Rotates queries or keys, in float32 or better; the result has the dtype of `x_BHSd`."""
    dtype = torch.promote_types(x_BHSd.dtype, torch.float32)
    cos, sin = rotation.cos.to(dtype), rotation.sin.to(dtype)
    first, second = x_BHSd.to(dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x_BHSd.dtype)


def _angles(position_S: Tensor, pairs: int) -> Tensor:
    frequency = LONGEST_PERIOD ** (-torch.arange(pairs, dtype=torch.float64, device=position_S.device) / pairs)
    return position_S[:, None].double() * frequency
