"""Exponential moving average (EMA) of the weights, sharded like the optimizer.

Each master partition of the engine has a flat fp32 tensor of averages. An update is one lerp for each partition and
needs no communication. At stage 0, where every parameter is a partition, it is a single fused lerp. Source: the paper's
recipe, decay 0.9999. Warm-up of the decay: `config/average_decay.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megapromoe.config.average_decay import decay_at
from megapromoe.engine.engine import Engine
from megapromoe.engine.step_result import StepResult


class EMA:
    """ema ← decay·ema + (1 - decay)·weights after every step.

    Attributes:
        averages: one flat fp32 tensor for each partition of the engine.
        warmup: whether the decay of the first updates is smaller, see `average_decay.decay_at`.
    """

    def __init__(self, engine: Engine, decay: float, warmup: bool = False):
        """Starts with the current weights of the engine.

        Args:
            engine: whose weights are averaged.
            decay: per optimizer step, 0 to 1.
            warmup: use a smaller decay for the first updates.
        """
        self.engine, self.decay, self.warmup = engine, decay, warmup
        self.averages: list[Tensor] = [p.master.detach().clone() for p in engine.partitions]
        device = self.averages[0].device if self.averages else None
        # The number of updates is on the device, because the host may not know yet whether a step was applied.
        self._updates = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def continue_from(self, updates: int, warmup: bool) -> None:
        """Continues after a number of updates; the caller writes the tensors of `averages`."""
        self.warmup = warmup
        self._updates.fill_(updates)

    @torch.no_grad()
    def update(self, result: StepResult) -> None:
        """Updates the averages if the step was applied. The host waits for the GPU only if it decides on clipping."""
        masters = [p.master.detach() for p in self.engine.partitions]
        if self.engine.clips_on_device:
            applied = result.applied_on_device
            weight = (applied * (1 - self._decay_on_device(applied))).float()
            for average, master in zip(self.averages, masters, strict=True):
                average.lerp_(master, weight)
        elif result.applied:
            decay = self.decay
            if self.warmup:
                self._updates += 1
                decay = decay_at(int(self._updates), decay, True)
            torch._foreach_lerp_(self.averages, masters, 1 - decay)

    def _decay_on_device(self, applied: Tensor) -> Tensor | float:
        """`decay_at` of this update, computed on the device."""
        if not self.warmup:
            return self.decay
        self._updates += applied
        return ((1 + self._updates) / (10 + self._updates)).clamp(max=self.decay)

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
