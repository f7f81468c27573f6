"""Exponential moving average (EMA) of the weights, sharded like the optimizer.

Each master partition of the engine has a flat fp32 tensor of averages. An update is one lerp for each partition and
needs no communication. At stage 0, where every parameter is a partition, it is a single fused lerp. Source: the paper's
recipe, decay 0.9999.
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
        """Starts with the current weights of the engine.

        Args:
            decay: per optimizer step, 0 to 1.
        """
        self.engine, self.decay = engine, decay
        self.averages: list[Tensor] = [p.master.detach().clone() for p in engine.partitions]

    @torch.no_grad()
    def update(self, result: StepResult) -> None:
        """Updates the averages if the step was applied. The host waits for the GPU only if it decides on clipping."""
        masters = [p.master.detach() for p in self.engine.partitions]
        if self.engine.clips_on_device:
            weight = (result.applied_on_device * (1 - self.decay)).float()
            for average, master in zip(self.averages, masters, strict=True):
                average.lerp_(master, weight)
        elif result.applied:
            torch._foreach_lerp_(self.averages, masters, 1 - self.decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Context in which the model has the averages as its weights. Collective; do not train within it."""
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
