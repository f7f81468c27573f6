"""What a run logs of the steps since its last log line: means over those that changed the model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megapromoe.config.options import Config
from megapromoe.distributed.mesh import Mesh
from megapromoe.nn.dit import AuxiliaryOutput
from megapromoe.planning import cost
from megapromoe.planning.machines import peak_flops
from megapromoe.run_lines import AUXILIARY_LOSSES, DENOISING_LOSS, TOTAL_LOSS
from megapromoe.training.metrics import expert_statistics, memory, throughput

LOAD, GATE, APPLIED = "expert_load", "gate", "applied"


class MetricAccumulator:
    """Sums over the steps of a log line; tensors stay on the device until `close`, so that the host never waits.

    A step that was not applied has losses that are not finite, or those of a spike. It counts for the speed, and for
    nothing else. Whether it was applied is known on the device when the step has run, so the sums of a step are kept
    apart until then.

    Attributes:
        damaged: samples with damaged records since the last `close`, of this rank.
        all_damaged: samples with damaged records in all closed windows, of all ranks.
    """

    _sums: Tensor | None  # all sums of `_shapes`, then the number of applied steps, flat
    _shapes: dict[str, torch.Size]
    _steps: int

    def __init__(self, config: Config, mesh: Mesh, device: torch.device):
        self.config, self.mesh, self.device = config, mesh, device
        self.flops = cost.flops_per_image(config.model).training
        self.peak = peak_flops(torch.cuda.get_device_name(device) if device.type == "cuda" else None)
        self.all_damaged = 0
        self._step: dict[str, Tensor] = {}  # name -> sum over the micro-batches of the step under way
        self._one = torch.ones(1, device=device)
        self._reset()

    def add(self, denoising: Tensor, total: Tensor, auxiliary: AuxiliaryOutput) -> None:
        """Takes in a micro-batch."""
        values = {DENOISING_LOSS: denoising.detach()}
        values |= {AUXILIARY_LOSSES[name]: loss_L.detach().sum() for name, loss_L in auxiliary.losses.items()}
        values[TOTAL_LOSS] = total.detach()
        if auxiliary.dropped_M is not None:
            values["dropped_rows"] = auxiliary.dropped_M.mean()
        values |= {GATE: auxiliary.weight_M, LOAD: auxiliary.load_ME}
        self._step = {n: self._step[n] + value if n in self._step else value for n, value in values.items()}

    def end_step(self, applied: Tensor) -> None:
        """Takes in the step whose micro-batches were added. Waits for nothing.

        Args:
            applied: whether the step changed the model, () bool on the device.
        """
        shapes = {name: value.shape for name, value in self._step.items()}
        packed = torch.cat([*(value.float().reshape(-1) for value in self._step.values()), self._one])
        if self._sums is None:
            self._shapes, self._sums = shapes, torch.zeros_like(packed)
        if shapes != self._shapes:
            raise ValueError(f"a step has the metrics {shapes}, the steps before it had {self._shapes}")
        self._sums = torch.where(applied, self._sums + packed, self._sums)
        self._step = {}
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what is not training out of the clock."""
        start = time.perf_counter()
        yield
        self._excluded += time.perf_counter() - start

    def close(self, norm: float, rate: float) -> tuple[dict[str, float | None], dict[str, Tensor]]:
        """Ends the window and starts the next one. Collective.

        Args:
            norm: gradient norm of the last step.
            rate: learning rate of the last step.

        Returns:
            name -> number: means over the applied steps and all data ranks, None where no step was applied; how many
            these are, `steps_averaged`; the speed over all steps.
            name -> tensor (MoE layers,) or (MoE layers, experts), on the host: numbers of each layer over the applied
            steps; empty where no step was applied, and of dense models.
        """
        assert self._sums is not None, "a window has at least one step"
        data_ranks = self.mesh.dp.size
        packed = torch.cat([self._sums, torch.tensor([float(self.damaged)], device=self.device)])
        dist.all_reduce(packed, group=self.mesh.dp.process_group)
        *sums, count, damaged = packed.cpu().split([*(math.prod(s) for s in self._shapes.values()), 1, 1])
        named = {name: total.view(shape) for (name, shape), total in zip(self._shapes.items(), sums, strict=True)}
        load, gate = named.pop(LOAD), named.pop(GATE)
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
            values |= expert_statistics(load)
            layers = {LOAD: load, GATE: gate / batches}
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
