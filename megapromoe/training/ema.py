"""Averaged weights, sharded like the optimizer.

One flat fp32 tensor stands beside each of the engine's master partitions; a step is one fused lerp over them, without
any traffic. Source: the paper's recipe, decay 0.9999.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megapromoe.training.engine import Engine


class EMA:
    """ema ← decay·ema + (1 - decay)·weights after every step."""

    def __init__(self, engine: Engine, decay: float):
        """Starts at the engine's current weights."""
        self.engine, self.decay = engine, decay
        self.averages: list[Tensor] = [p.master.detach().clone() for p in engine.partitions]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the weights."""
        masters = [p.master.detach() for p in self.engine.partitions]
        torch._foreach_lerp_(self.averages, masters, 1 - self.decay)
