"""Averaged weights, sharded like the optimizer.

One flat fp32 tensor stands beside each of the engine's master partitions; a step is one lerp over each, without any
traffic. At stage 0, whose partitions are the parameters, one fused lerp runs over all.
Source: the paper's recipe, decay 0.9999.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megapromoe.engine.engine import Engine
from megapromoe.engine.step_result import StepResult


class EMA:
    """ema ← decay·ema + (1 - decay)·weights after every step."""

    def __init__(self, engine: Engine, decay: float):
        """Starts from the engine's current weights."""
        self.engine, self.decay = engine, decay
        self.averages: list[Tensor] = [p.master.detach().clone() for p in engine.partitions]

    @torch.no_grad()
    def update(self, result: StepResult) -> None:
        """Moves the averages towards the weights if the step was applied. Waits only where the host decides that."""
        masters = [p.master.detach() for p in self.engine.partitions]
        if self.engine.clips_on_device:
            weight = (result.applied_on_device * (1 - self.decay)).float()
            for average, master in zip(self.averages, masters, strict=True):
                average.lerp_(master, weight)
        elif result.applied:
            torch._foreach_lerp_(self.averages, masters, 1 - self.decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within it the model computes with the averages, not the weights. Collective; do not train within it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for partition, average in zip(self.engine.partitions, self.averages, strict=True):
            weights = partition.master.detach().clone()
            partition.master.copy_(average)
            average.copy_(weights)
        self.engine.sync_parameters_from_masters()
