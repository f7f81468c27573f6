"""Alignment of tokens with features of a pretrained image encoder, the teacher, in training.

The tokens after one block pass an MLP, the projector, whose outputs are to point in the directions of the teacher's
features of the clean image, token by token. Source: Yu et al., REPA, arXiv 2410.06940, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapromoe.nn.tensor_parallel import Linear

PROJECTOR = "projector."  # before the names of the projector's parameters in a model
PROJECTOR_PARAMETERS = tuple(f"{PROJECTOR}mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias"))


class Projector(nn.Module):
    """Tokens (B, S, D) to features (B, S, W): three linear layers with SiLUs between them; every rank has all of it."""

    def __init__(self, width: int, hidden: int, features: int):
        """Makes a projector.

        Args:
            width: D.
            hidden: width of both hidden layers.
            features: W, channels of the teacher's features.
        """
        super().__init__()
        self.mlp = nn.Sequential(
            Linear(width, hidden), nn.SiLU(), Linear(hidden, hidden), nn.SiLU(), Linear(hidden, features)
        )

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.mlp(x_BSD)


def alignment_loss(projected_BSW: Tensor, teacher_BWHW: Tensor) -> Tensor:
    """Minus the mean cosine of projected tokens and the teacher's features, over all tokens and images, scalar.

    Args:
        projected_BSW: outputs of the projector; tokens in rows, from the top left.
        teacher_BWHW: features of the clean images, of any floating-point type.
    """
    teacher_BSW = teacher_BWHW.flatten(2).transpose(1, 2)
    if teacher_BSW.shape != projected_BSW.shape:
        shapes = f"{tuple(teacher_BSW.shape)} of the teacher, {tuple(projected_BSW.shape)} of the projector"
        raise ValueError(f"features have shapes {shapes} (images, tokens, channels): must be equal")
    return -torch.mean(F.cosine_similarity(projected_BSW.float(), teacher_BSW.float(), dim=-1))
