"""Runs optimizer steps of a model whose gradients, optimizer states and parameters are sharded.

DeepSpeed, behind `ShardedBackend`, shards gradients, optimizer states and (at stage 3) parameters. It sums gradients
over the data-parallel group, or over the expert-data-parallel group for routed experts, and divides both by the
data-parallel size. This module replaces what DeepSpeed computes wrongly or slowly with experts and tensor parallelism:

* **Gradient norm.** One formula for every stage (`_reduce_gradient_norm`) replaces DeepSpeed's, which counts experts
  wrongly at stage 0 and with tensor parallelism. If the norm is not finite, all ranks skip the update.
* **Clipping and skipping** are decided on the device if torch's fused AdamW or our own (`fused_update.py`) updates
  ZeRO's shards. Its kernel takes both decisions as tensors, so the host does not wait during a step and reads the
  result later (`StepResult`). At stage 0, with other optimizers and with offloading, the host waits for the norm and
  decides.
* **Balance biases** (`nn/moe/balance_bias.py`) move once for each applied step. The load of the experts is reduced with
  the gradient norm.
* **The update** with `train.adamw_backend=fused` is one pass over each partition. It includes the averaged weights and
  the cast to the parameters.
* **Masters.** In bf16, DeepSpeed would initialise its fp32 masters with values that are rounded to bf16. This module
  sets the exact values, and keeps buffers in fp32.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapromoe.config.deepspeed_file import load_deepspeed
from megapromoe.config.expert_placement import Placements
from megapromoe.config.options import Config
from megapromoe.distributed import watchdog
from megapromoe.distributed.mesh import Group, Mesh
from megapromoe.distributed.parameter_layout import ParameterLayout
from megapromoe.engine.fused_update import AdamW, State, fused_adamw_, scalars_of
from megapromoe.engine.matrix_exchange import MatrixExchange, matrices_of
from megapromoe.engine.muon import (
    HIDDEN_MATRICES,
    MuonAndAdamW,
    MuonConstants,
    MuonUpdate,
    hidden_parameters,
    momentum_of,
)
from megapromoe.engine.protocol import Averages, Partition, Piece, ShardedBackend
from megapromoe.engine.step_result import StepResult, votes_of
from megapromoe.imports import uncollected
from megapromoe.nn.dit import DiT
from megapromoe.nn.initial_values import InitialValues
from megapromoe.nn.moe.balance_bias import BalanceBiases
from megapromoe.nn.parallelize import build, initial_values


def trained_type(config: Config) -> torch.dtype:
    """The type of the parameters while they are trained. Raises ConfigError for an invalid `train.deepspeed`."""
    return torch.bfloat16 if load_deepspeed(config).get("bf16", {}).get("enabled", False) else torch.float32


def imports_compiler(config: Config, stage: int) -> bool:
    """Whether a step will import torch's compiler: to compile, or for wrappers that keep it out of a function.

    Such wrappers have torch's recomputation, DeepSpeed's stage 3, and optimizers other than `EagerAdamW`.
    """
    t = config.train
    return t.compile or t.adamw_backend != "torch" or stage == 3 or config.parallel.recompute != "none"


Loss = Callable[[Tensor, Any], tuple[Tensor, Tensor]]
"""(prediction, auxiliary output) -> (scalar to differentiate, what `Engine.micro_step` returns)."""


class Engine:
    """A model, its optimizer and its shards.

    Attributes:
        stage: the ZeRO stage, 0 to 3.
        layouts: parameter name -> layout.
        clips_on_device: whether clipping and skipping are decided on the device, without waiting.
        fused_averages: the averages that `step` updates in its pass over the weights; None without a fused update.
    """

    def __init__(self, model: DiT, config: Config, mesh: Mesh, values: InitialValues | None = None):
        """Wraps a model. Collective.

        Args:
            model: this rank's part, with `model.layouts`: float32, or with `values` of the type to train in.
            config: of the run.
            mesh: of the run.
            values: initial values, written to the masters; the parameters of the model then need none. None: the
                values of the model, of which bf16 training keeps a float32 copy on the host meanwhile.

        Raises ConfigError for an invalid `train.deepspeed`, and EngineError if this machine cannot run it.
        """
        ds = load_deepspeed(config)
        self.stage: int = ds.get("zero_optimization", {}).get("stage", 0)
        # Imported late: it takes seconds, and other modules need only the types of this one.
        with uncollected():
            from megapromoe.engine.deepspeed_backend.adapter import DeepSpeedAdapter

            if imports_compiler(config, self.stage):
                importlib.import_module("torch._dynamo")

        self.config, self.mesh = config, mesh
        self.layouts: dict[str, ParameterLayout] = model.layouts
        offloads = bool(ds.get("zero_optimization", {}).get("offload_optimizer"))
        self.clips_on_device = self.stage > 0 and config.train.adamw_backend in ("torch", "fused") and not offloads
        self.fused_averages: list[Averages] | None = [] if config.train.adamw_backend == "fused" else None
        backend_clips = self.stage > 0 and not self.clips_on_device
        rounds = trained_type(config) != torch.float32 and values is None
        exact = {name: p.detach().cpu().clone() for name, p in model.named_parameters()} if rounds else {}
        buffers = dict(model.named_buffers())

        clip = config.train.max_grad_norm if backend_clips else 0.0
        self._backend: ShardedBackend = DeepSpeedAdapter(model, config, mesh, ds, clip)
        for name, buffer in buffers.items():  # in bf16 a running mean would not change any more
            owner, _, attribute = name.rpartition(".")
            self.module.get_submodule(owner)._buffers[attribute] = buffer
        self._balance_biases = BalanceBiases(self.module)
        pieces = [piece for partition in self.partitions for piece in partition.pieces]
        weights = [1 / self.replica_count(piece.name) for piece in pieces]
        self._replica_weights = torch.tensor(weights, dtype=torch.float64, device=self._backend.device)
        self._hidden = hidden_parameters(config, self.layouts)
        clipped = [0.0 if piece.name in self._hidden else 1.0 for piece in pieces]
        self._clipped_weights = self._replica_weights * torch.tensor(clipped, device=self._backend.device)
        self._muon_updates = self._make_muon_updates()
        for name, value in exact.items():
            self._write_masters(name, value)
        if values is not None:
            self._write_initial_values(values)
        if exact or values is not None:
            self.sync_parameters_from_masters()

    @classmethod
    def new(
        cls, config: Config, mesh: Mesh, device: torch.device | str, placements: Placements | None = None
    ) -> Engine:
        """The engine of a model with initial values from `train.seed`. Collective; raises what the constructor raises.

        A rank draws only what its masters keep, one tensor or expert at a time. It never has a float32 copy of its
        part of the model, unless that is what is trained. `placements`: see `build`.
        """
        model = build(config, mesh, device, trained_type(config), placements)
        return cls(model, config, mesh, initial_values(config, mesh, placements))

    @property
    def module(self) -> DiT:
        """The model; at stage 3 its parameters are empty outside of its forward and backward."""
        return self._backend.module

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """This rank's part of the fp32 weights. After writing to them, call `sync_parameters_from_masters`."""
        return self._backend.partitions

    def micro_step(self, *inputs: Any, loss: Loss) -> Tensor:
        """Runs forward, loss and backward of a micro-batch.

        Gradients are accumulated over `train.accumulation` calls, each weighted with 1/accumulation.

        Args:
            inputs: of the model.
            loss: (prediction, auxiliary output) -> (scalar to differentiate, report).

        Returns:
            the report.
        """
        prediction, auxiliary = self._backend.forward(*inputs)
        if self._balance_biases:
            self._balance_biases.add(auxiliary.load_ME)
        total, report = loss(prediction, auxiliary)
        self._backend.backward(total)
        return report

    def finish_micro_step(self) -> None:
        """Ends a micro-step that is not the last of an update; `step` ends the last."""
        self._backend.step()

    def step(
        self,
        lr: float | Tensor,
        loss: Tensor | None = None,
        stop: bool = False,
        max_norm: float = math.inf,
        save: bool = False,
    ) -> StepResult:
        """Applies one update after the last micro-step. Collective.

        The gradient is clipped to `train.max_grad_norm` before; with Muon that of AdamW's parameters alone, by its own
        norm.

        All ranks skip the update if the gradient norm is not finite or larger than `max_norm`, or if `loss` is not
        finite on any rank.

        Args:
            lr: learning rate; with a fused update also a tensor of the device, ().
            loss: total loss of this rank with auxiliary losses, scalar; the update is skipped if it is not finite.
            stop: this rank requests to end the run after the step. `StepResult.stop` is true if any rank does. It is
                reduced with the norm, in the same collective.
            max_norm: a step with a larger gradient norm is a spike and is skipped.
            save: this rank requests a checkpoint soon; reduced in the same number as `stop`.
        """
        for group in self._backend.optimizer.param_groups:
            group["lr"] = lr * self._muon_rate if group.get(HIDDEN_MATRICES) else lr
        squares_and_votes, load_ME = self._reduce_gradient_norm(loss, votes_of(stop, save))
        result = StepResult(squares_and_votes, max_norm)
        if load_ME is not None:
            self._balance_biases.apply(load_ME, result.applied_on_device)
        if self.fused_averages is not None:
            self._update_fused(result, lr, self.fused_averages)
            return result
        if self.clips_on_device:
            self._clip_on_device(result)
        else:
            self._clip_on_host(result)
        self._backend.step()
        return result

    def _clip_on_device(self, result: StepResult) -> None:
        """Sets the divisor of the gradients in torch's fused AdamW, and whether it skips the update."""
        optimizer: Any = (
            self._backend.optimizer
        )  # torch's GradScaler sets these attributes, which the class does not declare
        optimizer.grad_scale = self._divisor(result).float()
        optimizer.found_inf = (~result.applied_on_device).float()

    def _divisor(self, result: StepResult) -> Tensor:
        """The number by which gradients are divided to clip them, (), on the device."""
        clip, norm = self.config.train.max_grad_norm, result.clipped_norm_on_device
        return ((norm + 1e-6) / clip).clamp(min=1.0) if clip else torch.ones_like(norm)

    def _update_fused(self, result: StepResult, lr: float | Tensor, fused_averages: list[Averages]) -> None:
        """Clips and updates weights, moments, averages and parameters in one pass over each partition."""
        applied, divisor = result.applied_on_device, self._divisor(result)
        rate = lr if isinstance(lr, Tensor) else torch.full_like(divisor, lr)
        weights, averages = [], []
        for averaged in fused_averages:
            weights += averaged.weights(applied)
            averages += averaged.averages

        def update(number: int, gradient: Tensor, parameter: Tensor) -> None:
            partition, group = self.partitions[number], self._backend.parameter_group(number)
            own_averages = tuple(of_each_partition[number] for of_each_partition in averages)
            if partition.uses_muon:
                master = partition.master.detach()
                momentum = self.moments(partition)["momentum"]
                self._muon_updates[number].apply(master, momentum, gradient, group["lr"], applied)
                for average, weight in zip(own_averages, weights, strict=True):
                    average.lerp_(master, weight)
                parameter.copy_(master)
                return
            beta1, beta2 = group["betas"]
            constants = AdamW(beta1, beta2, group["eps"], group["weight_decay"])
            moments = self.moments(partition)
            step = self._backend.optimizer.state[partition.optimized]["step"]
            state = State(
                partition.master.detach(),
                moments["exp_avg"],
                moments["exp_avg_sq"],
                own_averages,
                parameter,
            )
            scalars = scalars_of(step, applied, divisor, rate, constants)
            fused_adamw_(state, gradient, weights, scalars, constants)

        self._backend.step_by_partitions(update)

    def _clip_on_host(self, result: StepResult) -> None:
        """Clips at stage 0; at other stages sets the norm by which the backend clips."""
        self._backend.reported_norm = torch.tensor(result.norm if result.applied else -1.0)
        if self.stage:
            return
        if not result.applied:  # AdamW skips parameters without a gradient
            for p in self.module.parameters():
                p.grad = None
        elif self.config.train.max_grad_norm:
            scale = min(self.config.train.max_grad_norm / (result.clipped_norm + 1e-6), 1.0)
            clipped = (p.grad for name, p in self.module.named_parameters() if name not in self._hidden)
            torch._foreach_mul_([gradient for gradient in clipped if gradient is not None], scale)

    def _reduce_gradient_norm(self, loss: Tensor | None, votes: float) -> tuple[Tensor, Tensor | None]:
        """The sum of squares of the averaged gradient, and the sum of `votes_of`: (2,) float64. Collective.

        With Muon a third number: the sum of squares of the gradient of AdamW's parameters. The second result is the
        load (M, E) for the balance biases, tp times the rows of all data-parallel ranks; None without biases.

        Every logical element counts once at every stage and layout: the squares of all ranks' pieces are summed, each
        divided by the number of ranks that have the same piece. Not finite if the loss of any rank is not.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._backend.device)
        if loss is not None:
            total += 0.0 * loss
        norms = torch._foreach_norm([gradient for _, gradient in self.reduced_gradients()], dtype=torch.float64)
        squares = torch.stack(norms).square()
        total += squares @ self._replica_weights
        sums = [total, torch.full_like(total, votes)]
        if self._hidden:
            sums.append(squares @ self._clipped_weights)
        packed = squares_and_votes = torch.stack(sums)
        load_ME = None
        if self._balance_biases:
            load_ME = self._balance_biases.take_load()
            packed = torch.cat([squares_and_votes, load_ME.flatten()])
        dist.all_reduce(packed, group=self.mesh.world.process_group)
        if load_ME is not None:
            squares_and_votes, load_ME = packed[: len(sums)], packed[len(sums) :].view_as(load_ME)
        return squares_and_votes, load_ME

    def reduced_gradients(self) -> Iterator[tuple[Piece, Tensor]]:
        """This rank's part of the averaged gradients; call it between the last micro-step and the step.

        Yields:
            pieces with their gradients, flat (stop - start,).
        """
        for number, partition in enumerate(self.partitions):
            for piece, gradient in zip(partition.pieces, self._backend.gradients(number), strict=True):
                yield piece, gradient[: piece.stop - piece.start]

    def replica_count(self, name: str) -> int:
        """How many ranks have the same piece of a parameter's gradient, master and moments."""
        layout = self.layouts[name]
        return layout.replica_count(self.mesh) * self._undivided_group(layout).size

    def is_writer(self, name: str) -> bool:
        """Whether this rank saves its pieces of a parameter, among the ranks that have the same pieces."""
        layout = self.layouts[name]
        first_copy = self.mesh.tp.rank == 0 or layout.replica_count(self.mesh) == 1
        return first_copy and self._undivided_group(layout).rank == 0

    def _undivided_group(self, layout: ParameterLayout) -> Group:
        """The ranks, of those that sum the gradient of a parameter, that have the same pieces of it."""
        return self.mesh.replica_group(layout.expert) if self.stage else layout.gradient_group(self.mesh)

    def moments(self, partition: Partition) -> dict[str, Tensor]:
        """The optimizer's state of a partition, flat; initialised with zeros before the first step.

        Returns:
            AdamW's `exp_avg` and `exp_avg_sq`, or Muon's `momentum`.
        """
        key = partition.optimized
        if partition.uses_muon:
            return {"momentum": momentum_of(self._backend.optimizer, key).view(-1)}
        state = self._backend.optimizer.state[key]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(key, memory_format=torch.preserve_format).detach()
        if "step" not in state and not self._counts_steps_by_group():
            state["step"] = torch.zeros((), dtype=torch.float32, device=key.device)
        return {name: state[name].view(-1) for name in ("exp_avg", "exp_avg_sq")}

    def set_optimizer_step(self, step: int) -> None:
        """Sets the step count of AdamW, which determines its bias correction."""
        optimizer = self._backend.optimizer
        for partition in self.partitions:
            self.moments(partition)
            if not self._counts_steps_by_group() and not partition.uses_muon:
                optimizer.state[partition.optimized]["step"].fill_(float(step))
        for group in optimizer.param_groups:
            if self._counts_steps_by_group():
                group["step"] = step

    def sync_parameters_from_masters(self) -> None:
        """Copies the masters into the parameters of the model, after writing to the masters. Collective."""
        self._backend.sync_parameters_from_masters()

    def close(self) -> None:
        """Frees the hooks and buffers of the backend."""
        self._backend.close()

    @property
    def hidden_parameters(self) -> frozenset[str]:
        """The names of the parameters that Muon updates; empty with another optimizer."""
        return self._hidden

    @property
    def _muon_rate(self) -> float:
        """The learning rate of Muon relative to that of AdamW."""
        train = self.config.train
        return train.muon_lr / train.lr if train.muon_lr else 1.0

    def _make_muon_updates(self) -> dict[int, MuonUpdate]:
        """The updates of the partitions that use Muon, which the optimizer gets too."""
        constants, updates = MuonConstants.from_config(self.config.train), {}
        for number, partition in enumerate(self.partitions):
            if partition.uses_muon:
                shards = self._backend.shards(number)
                names = dict.fromkeys(piece.name for pieces in shards.pieces for piece in pieces)
                matrices = [matrix for name in names for matrix in matrices_of(self.layouts[name], self.mesh)]
                updates[number] = MuonUpdate(constants, MatrixExchange(matrices, shards), trained_type(self.config))
        if isinstance(self._backend.optimizer, MuonAndAdamW):
            self._backend.optimizer.updates = {self.partitions[n].optimized: update for n, update in updates.items()}
        return updates

    @torch.no_grad()
    def _write_masters(self, name: str, value: Tensor) -> None:
        """Writes this rank's parameter `name` into those pieces of it that its partitions have."""
        for partition in self.partitions:
            for piece in partition.pieces:
                if piece.name == name:
                    target = partition.master[piece.offset : piece.offset + piece.stop - piece.start]
                    target.copy_(value.view(-1)[piece.start : piece.stop])

    @torch.no_grad()
    def _write_initial_values(self, values: InitialValues) -> None:
        for partition in self.partitions:
            for piece in partition.pieces:
                watchdog.touch()
                values.write(
                    piece.name, partition.master[piece.offset : piece.offset + piece.stop - piece.start], piece.start
                )

    def _counts_steps_by_group(self) -> bool:
        """Whether the optimizer has its step count in the parameter group, as those of apex and DeepSpeed."""
        return self.config.train.adamw_backend not in ("torch", "fused")
