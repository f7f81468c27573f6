"""Our model, its optimizer and its shards, driven one optimizer step at a time.

DeepSpeed, behind `ShardedBackend`, shards gradients, optimizer states and (stage 3) parameters. It reduces gradients
over the data-parallel group, and over the expert-data-parallel group for routed experts, both divided by the
data-parallel size. What it does not get right for experts and tensor parallelism together is done here:

* **The norm.** One formula for every stage (`_reduce_gradient_norm`) replaces DeepSpeed's, which miscounts experts at
  stage 0 and under tensor parallelism. Where it is not finite, all ranks skip the update.
* **Clipping and skipping** happen on the device where torch's fused AdamW updates ZeRO's shards there: its kernel takes
  both as tensors, so the host does not wait during a step, and reads what it did later (`StepResult`). At stage 0, with
  other optimizers and with offloaded ones the host decides, and waits for the norm.
* **Masters.** In bf16, DeepSpeed would start its fp32 masters from values rounded to bf16; they get the exact ones.
  Buffers keep their values in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapromoe.config.deepspeed_file import load_deepspeed
from megapromoe.config.options import Config
from megapromoe.distributed.mesh import Mesh
from megapromoe.distributed.parameter_layout import ParameterLayout
from megapromoe.engine.protocol import Partition, Piece, ShardedBackend
from megapromoe.engine.step_result import StepResult
from megapromoe.nn.dit import DiT

# What the loss of a micro-step is made of: (prediction, auxiliary output) -> (scalar to differentiate, report).
Loss = Callable[[Tensor, Any], tuple[Tensor, Tensor]]


class Engine:
    """A model, its optimizer and its shards.

    Attributes:
        stage: the ZeRO stage, 0 to 3.
        layouts: of every parameter, by name.
        clips_on_device: clipping and skipping are decided on the device, without the host.
    """

    def __init__(self, model: DiT, config: Config, mesh: Mesh):
        """Wraps `model` (fp32, this rank's part, with `model.layouts`). Collective.

        Raises ConfigError for a refused `train.deepspeed`, and EngineError where this machine cannot run it.
        """
        # It takes seconds to import, so whoever needs only the types of this file is spared it.
        from megapromoe.engine.deepspeed_adapter import DeepSpeedAdapter

        ds = load_deepspeed(config)
        self.config, self.mesh = config, mesh
        self.layouts: dict[str, ParameterLayout] = model.layouts
        self.stage: int = ds.get("zero_optimization", {}).get("stage", 0)
        offloads = bool(ds.get("zero_optimization", {}).get("offload_optimizer"))
        self.clips_on_device = self.stage > 0 and config.train.optimizer == "torch" and not offloads
        backend_clips = self.stage > 0 and not self.clips_on_device
        bf16 = ds.get("bf16", {}).get("enabled", False)
        exact = {name: p.detach().cpu().clone() for name, p in model.named_parameters()} if bf16 else {}
        buffers = dict(model.named_buffers())

        clip = config.train.clip if backend_clips else 0.0
        self._backend: ShardedBackend = DeepSpeedAdapter(model, config, mesh, ds, clip)
        for name, buffer in buffers.items():  # rounded to bf16, a running mean would stand still
            owner, _, attribute = name.rpartition(".")
            self.module.get_submodule(owner)._buffers[attribute] = buffer
        pieces = [piece for partition in self.partitions for piece in partition.pieces]
        weights = [1 / self.replica_count(piece.name) for piece in pieces]
        self._replica_weights = torch.tensor(weights, dtype=torch.float64, device=self._backend.device)
        for name, value in exact.items():
            self._write_masters(name, value)
        if exact:
            self.sync_parameters_from_masters()

    @property
    def module(self) -> DiT:
        """The model; under stage 3 its parameters are empty outside of its own forward."""
        return self._backend.module

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """This rank's part of the fp32 weights. Whoever writes to them calls `sync_parameters_from_masters`."""
        return self._backend.partitions

    def micro_step(self, *inputs: Any, loss: Loss) -> Tensor:
        """Forward, `loss(prediction, auxiliary) -> (scalar, report)`, backward; returns the report.

        Gradients add up over `train.accumulation` calls; each counts as 1/accumulation.
        """
        prediction, auxiliary = self._backend.forward(*inputs)
        total, report = loss(prediction, auxiliary)
        self._backend.backward(total)
        return report

    def finish_micro_step(self) -> None:
        """Ends a micro-step before the last of an update; `step` ends the last."""
        self._backend.step()

    def step(self, lr: float, loss: Tensor | None = None, stop: bool = False, largest: float = math.inf) -> StepResult:
        """One AdamW update after the last micro-step, with the gradient clipped to `train.clip`. Collective.

        Where the gradient's norm is not finite, or larger than `largest`, or `loss` is not finite on any rank, no rank
        changes anything.

        Args:
            lr: learning rate of the update.
            loss: the total on this rank, with auxiliary losses, checked for being finite.
            stop: this rank would like to end after the step. The result says whether any rank does; it travels with the
                norm, in the same collective.
            largest: norm above which the step counts as a spike and is skipped.
        """
        for group in self._backend.optimizer.param_groups:
            group["lr"] = lr
        result = StepResult(self._reduce_gradient_norm(loss, stop), largest)
        if self.clips_on_device:
            self._clip_on_device(result)
        else:
            self._clip_on_host(result)
        self._backend.step()
        return result

    def _clip_on_device(self, result: StepResult) -> None:
        """Sets what torch's fused AdamW divides gradients by, and whether it skips the update."""
        clip = self.config.train.clip
        norm = result.norm_on_device
        scale = ((norm + 1e-6) / clip).clamp(min=1.0) if clip else torch.ones_like(norm)
        optimizer: Any = self._backend.optimizer  # attributes that torch's GradScaler sets, not declared by the class
        optimizer.grad_scale = scale.float()
        optimizer.found_inf = (~result.applied_on_device).float()

    def _clip_on_host(self, result: StepResult) -> None:
        """Clips at stage 0; at others the backend does, by the norm that it is given."""
        self._backend.reported_norm = torch.tensor(result.norm if result.applied else -1.0)
        if self.stage:
            return
        if not result.applied:  # AdamW passes over parameters without a gradient
            for p in self.module.parameters():
                p.grad = None
        elif self.config.train.clip:
            scale = min(self.config.train.clip / (result.norm + 1e-6), 1.0)
            torch._foreach_mul_([p.grad for p in self.module.parameters() if p.grad is not None], scale)

    def _reduce_gradient_norm(self, loss: Tensor | None, stop: bool) -> Tensor:
        """The sum of squares of the whole averaged gradient, and the votes to stop: (2,) float64. Collective.

        Every logical element counts once, at every stage and layout: squares are summed over all ranks' parts, each
        divided by the number of ranks that hold the same part. Not finite if any rank's loss is not.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._backend.device)
        if loss is not None:
            total += 0.0 * loss
        norms = torch._foreach_norm([gradient for _, gradient in self.reduced_gradients()], dtype=torch.float64)
        total += torch.stack(norms).square() @ self._replica_weights
        squares_and_votes = torch.stack([total, torch.full_like(total, float(stop))])
        dist.all_reduce(squares_and_votes, group=self.mesh.whole.handle)
        return squares_and_votes

    def reduced_gradients(self) -> Iterator[tuple[Piece, Tensor]]:
        """This rank's part of the averaged gradients, between the last micro-step and the step.

        Yields:
            a piece and its gradient, flat (stop - start,).
        """
        for number, partition in enumerate(self.partitions):
            for piece, gradient in zip(partition.pieces, self._backend.gradients(number), strict=True):
                yield piece, gradient[: piece.stop - piece.start]

    def replica_count(self, name: str) -> int:
        """How many ranks hold the same piece of a parameter's gradient, master and moments."""
        layout = self.layouts[name]
        unsharded = layout.gradient_group(self.mesh).size if self.stage == 0 else 1
        return layout.replicas(self.mesh) * unsharded

    def is_writer(self, name: str) -> bool:
        """Whether this rank, of those that hold the same piece of a parameter, is the one that saves it."""
        layout = self.layouts[name]
        first_copy = self.mesh.tp.rank == 0 or layout.replicas(self.mesh) == 1
        return first_copy and (self.stage > 0 or layout.gradient_group(self.mesh).rank == 0)

    def moments(self, partition: Partition) -> dict[str, Tensor]:
        """AdamW's `exp_avg` and `exp_avg_sq` of a partition, flat; made (zero) if there was no step yet."""
        key = partition.optimized
        state = self._backend.optimizer.state[key]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(key, memory_format=torch.preserve_format).detach()
        if "step" not in state and not self._counts_steps_by_group():
            state["step"] = torch.zeros((), dtype=torch.float32, device=key.device)
        return {name: state[name].view(-1) for name in ("exp_avg", "exp_avg_sq")}

    def set_optimizer_step(self, step: int) -> None:
        """Sets AdamW's step count, on which its bias correction depends."""
        optimizer = self._backend.optimizer
        for partition in self.partitions:
            self.moments(partition)
            if not self._counts_steps_by_group():
                optimizer.state[partition.optimized]["step"].fill_(float(step))
        for group in optimizer.param_groups:
            if self._counts_steps_by_group():
                group["step"] = step

    def sync_parameters_from_masters(self) -> None:
        """Copies masters that were written to into the parameters that the model computes with. Collective."""
        self._backend.sync_parameters_from_masters()

    def close(self) -> None:
        """Frees the backend's hooks and buffers."""
        self._backend.close()

    @torch.no_grad()
    def _write_masters(self, name: str, value: Tensor) -> None:
        """Writes this rank's whole parameter `name` into the pieces of it that its partitions hold."""
        for partition in self.partitions:
            for piece in partition.pieces:
                if piece.name == name:
                    target = partition.master[piece.offset : piece.offset + piece.stop - piece.start]
                    target.copy_(value.view(-1)[piece.start : piece.stop])

    def _counts_steps_by_group(self) -> bool:
        """Whether the optimizer keeps its step count in the parameter group, as apex and DeepSpeed do."""
        return self.config.train.optimizer != "torch"
