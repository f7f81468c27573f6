"""Means over the steps since the last log line, of the steps that were applied."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megapromoe.config.expert_placement import ExpertPlacement, Placements
from megapromoe.config.options import Config
from megapromoe.distributed.mesh import Mesh
from megapromoe.nn.dit import AuxiliaryOutput
from megapromoe.planning import cost
from megapromoe.planning.machines import peak_flops
from megapromoe.run_lines import DENOISING_LOSS, TOTAL_LOSS, logged_loss
from megapromoe.training.metrics import expert_statistics, memory, rank_statistics, throughput

LOAD, ROUTING_WEIGHT = "expert_load", "gate"


class MetricAccumulator:
    """Accumulates metrics over the steps of a log interval. Tensors stay on the device until `close`, without a sync.

    A step that was not applied has losses that are not finite, or those of a spike. It is counted for the speed only.
    Whether a step was applied is known, on the device, only after the step, so its sums are kept separately until then.

    Attributes:
        damaged: number of samples with damaged records on this rank since the last `close`.
        all_damaged: number of samples with damaged records on all ranks in all closed intervals.
    """

    _sums: Tensor | None  # flat: the sums with the shapes of `_shapes`, then the number of applied steps
    _shapes: dict[str, torch.Size]
    _steps: int

    def __init__(self, config: Config, mesh: Mesh, device: torch.device, placements: Placements | None = None):
        """Starts an interval. `placements`: which ranks have which experts, see `nn.parallelize.build`."""
        self.config, self.mesh, self.device = config, mesh, device
        consecutive = ExpertPlacement.contiguous(config.model.num_experts, mesh.ep.size)
        self.placements = [(placements or {}).get(block, consecutive) for block in config.model.moe_blocks]
        self.flops = cost.flops_per_image(config.model).training
        self.peak = peak_flops(torch.cuda.get_device_name(device) if device.type == "cuda" else None)
        self.all_damaged = 0
        self._step: dict[str, Tensor] = {}  # name -> sum over the micro-batches of the current step
        self._increment = torch.ones(1, device=device)
        self._reset()

    def add(self, denoising: Tensor, total: Tensor, auxiliary: AuxiliaryOutput) -> None:
        """Adds a micro-batch.

        Args:
            denoising, total: losses, ().
            auxiliary: auxiliary losses, routing weights and expert loads of the MoE layers.
        """
        values = {DENOISING_LOSS: denoising.detach()}
        values |= {logged_loss(name): loss_L.detach().sum() for name, loss_L in auxiliary.losses.items()}
        values[TOTAL_LOSS] = total.detach()
        if auxiliary.dropped_M is not None:
            values["dropped_rows"] = auxiliary.dropped_M.mean()
        values |= {ROUTING_WEIGHT: auxiliary.weight_M, LOAD: auxiliary.load_ME}
        self._step = {n: self._step[n] + value if n in self._step else value for n, value in values.items()}

    def end_step(self, applied: Tensor) -> None:
        """Ends the step whose micro-batches were added, without a host sync.

        Args:
            applied: whether the step changed the model, () bool on the device.
        """
        shapes = {name: value.shape for name, value in self._step.items()}
        packed = torch.cat([*(value.float().reshape(-1) for value in self._step.values()), self._increment])
        if self._sums is None:
            self._shapes, self._sums = shapes, torch.zeros_like(packed)
        if shapes != self._shapes:
            raise ValueError(f"a step has the metrics {shapes}, the steps before it had {self._shapes}")
        self._sums = torch.where(applied, self._sums + packed, self._sums)
        self._step = {}
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of the block, which is not training, from the speed."""
        start = time.perf_counter()
        yield
        self._excluded += time.perf_counter() - start

    def close(self, norm: float, rate: float) -> tuple[dict[str, float | None], dict[str, Tensor]]:
        """Ends the interval and starts the next one. Collective.

        Args:
            norm: gradient norm of the last step.
            rate: learning rate of the last step.

        Returns:
            name -> number: means over the applied steps and all data ranks, None if no step was applied; the number of
            applied steps, `steps_averaged`; the speed over all steps.
            name -> tensor (M,) or (M, E) on the host, M MoE layers and E experts, over the applied steps; empty if no
            step was applied, and for dense models.
        """
        assert self._sums is not None, "an interval has at least one step"
        data_ranks = self.mesh.dp.size
        packed = torch.cat([self._sums, torch.tensor([float(self.damaged)], device=self.device)])
        dist.all_reduce(packed, group=self.mesh.dp.process_group)
        *sums, count, damaged = packed.cpu().split([*(math.prod(s) for s in self._shapes.values()), 1, 1])
        named = {name: total.view(shape) for (name, shape), total in zip(self._shapes.items(), sums, strict=True)}
        load, routing_weight = named.pop(LOAD), named.pop(ROUTING_WEIGHT)
        applied = round(count.item() / data_ranks)
        batches = applied * self.config.train.accumulation * data_ranks
        values: dict[str, float | None] = {
            n: (total / batches).item() if applied else None for n, total in named.items()
        }
        values |= {"steps_averaged": applied, "gradient_norm": norm, "learning_rate": rate}
        seconds = time.perf_counter() - self._start - self._excluded
        images = self._steps * self.config.train.global_batch
        values |= throughput(images, seconds, self.flops, self.mesh.world_size, self.peak)
        layers = {}
        if applied and load.numel():
            values |= expert_statistics(load) | rank_statistics(load, self.placements)
            layers = {LOAD: load, ROUTING_WEIGHT: routing_weight / batches}
        values["memory_bytes"] = memory()
        self.all_damaged += int(damaged.item())
        if self.all_damaged:
            values["damaged_samples"] = self.all_damaged
        self._reset()
        return values, layers

    def _reset(self) -> None:
        self._sums, self._shapes = None, {}
        self._steps = self.damaged = 0
        self._start = time.perf_counter()
        self._excluded = 0.0
