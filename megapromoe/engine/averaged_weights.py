"""Exponential moving averages (EMA) of the weights, sharded like the optimizer.

For each decay, each master partition of the engine has a flat fp32 tensor of averages. An update is one lerp for each
partition and decay and needs no communication. At stage 0, where every parameter is a partition, it is a single fused
lerp for each decay. torch has no operation that updates several averages of a tensor at once, so the masters are read
once for each decay. A fused update (`train.adamw_backend=fused`) includes the averages in its pass over the weights.
Source: the paper's recipe, decay 0.9999. Warm-up of the decay: `config/average_decay.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megapromoe.config.average_decay import decay_at
from megapromoe.engine.engine import Engine
from megapromoe.engine.step_result import StepResult

_SWAPPED = 1 << 22  # elements that are copied at a time when weights and averages change places


class EMA:
    """ema ← decay·ema + (1 - decay)·weights after every step, for each of several decays.

    With a fused update the engine's step itself updates the averages of every `EMA` that was made for the engine.

    Attributes:
        decays: the decays. The first is that of previews.
        averages: for each decay, one flat fp32 tensor for each partition of the engine.
        warmup: whether the decay of the first updates is smaller, see `average_decay.decay_at`.
    """

    def __init__(self, engine: Engine, decays: Sequence[float], warmup: bool = False):
        """Starts with the current weights of the engine.

        Args:
            engine: whose weights are averaged.
            decays: per optimizer step, 0 to 1; at least one.
            warmup: use smaller decays for the first updates.
        """
        self.engine, self.decays, self.warmup = engine, tuple(decays), warmup
        self.averages: list[list[Tensor]] = [
            [p.master.detach().clone() for p in engine.partitions] for _ in self.decays
        ]
        device = engine.partitions[0].master.device if engine.partitions else None
        # The numbers of updates are on the device, because the host may not know yet whether a step was applied.
        self._updates = [torch.zeros((), dtype=torch.float64, device=device) for _ in self.decays]
        if engine.fused_averages is not None:
            engine.fused_averages.append(self)

    @torch.no_grad()
    def continue_from(self, updates: Sequence[int], warmup: bool) -> None:
        """Continues after a number of updates of each average; the caller writes the tensors of `averages`."""
        self.warmup = warmup
        for counter, count in zip(self._updates, updates, strict=True):
            counter.fill_(count)

    @torch.no_grad()
    def update(self, result: StepResult) -> None:
        """Updates the averages if the step was applied, unless the step has updated them.

        The host waits for the GPU only if it decides on clipping.
        """
        if self.engine.fused_averages is not None:
            return
        masters = [p.master.detach() for p in self.engine.partitions]
        if self.engine.clips_on_device:
            weights = self.weights(result.applied_on_device)
            for averages, weight in zip(self.averages, weights, strict=True):
                for average, master in zip(averages, masters, strict=True):
                    average.lerp_(master, weight)
        elif result.applied:
            for averages, decay, updates in zip(self.averages, self.decays, self._updates, strict=True):
                torch._foreach_lerp_(averages, masters, 1 - self._decay_on_host(decay, updates))

    def weights(self, applied: Tensor) -> list[Tensor]:
        """For each decay how far the average moves towards the new weights, (); counts the update if it is `applied`.

        Args:
            applied: bool, (), on the device; if it is false, nothing moves.
        """
        return [
            (applied * (1 - self._decay_on_device(applied, decay, updates))).float()
            for decay, updates in zip(self.decays, self._updates, strict=True)
        ]

    def _decay_on_host(self, decay: float, updates: Tensor) -> float:
        """`decay_at` of this applied update; counts it in `updates`."""
        if not self.warmup:
            return decay
        updates += 1
        return decay_at(int(updates), decay, True)

    def _decay_on_device(self, applied: Tensor, decay: float, updates: Tensor) -> Tensor | float:
        """`decay_at` of this update, computed on the device; counts it in `updates` if it is applied."""
        if not self.warmup:
            return decay
        updates += applied
        return ((1 + updates) / (10 + updates)).clamp(max=decay)

    @contextmanager
    def swapped_in(self, index: int = 0) -> Iterator[None]:
        """Context in which the model has averages as its weights. Collective; do not train within it.

        Args:
            index: position of the decay in `decays`.
        """
        self._swap(index)
        try:
            yield
        finally:
            self._swap(index)

    @torch.no_grad()
    def _swap(self, index: int) -> None:
        for partition, average in zip(self.engine.partitions, self.averages[index], strict=True):
            for master, part in zip(partition.master.split(_SWAPPED), average.split(_SWAPPED), strict=True):
                weights = master.clone()
                master.copy_(part)
                part.copy_(weights)
        self.engine.sync_parameters_from_masters()
