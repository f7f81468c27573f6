"""Somebody's own transformer block around our MoE layer, and one batch for it."""

import torch
from torch import nn

from megapromoe.nn import MoE

D, E, S, NUM_CLASSES = 16, 4, 9, 10


class Network(nn.Module):
    """Attention of torch's own, our layer, and a linear head."""

    def __init__(self, **options):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.moe = MoE(**{"hidden_size": D, "num_experts": E, **options})
        self.head = nn.Linear(D, 3)

    def forward(self, x, num_conditional=None, y=None):
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        out, auxiliary = self.moe(self.norm(x), num_conditional=num_conditional, y=y)
        return self.head(x + out), auxiliary


def tokens(B: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(seed))
