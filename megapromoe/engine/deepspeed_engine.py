"""Our model under DeepSpeed's engine and ZeRO. The only file that imports deepspeed.

DeepSpeed shards gradients, optimizer states and (stage 3) parameters, and reduces gradients: over the data-parallel
group, and over the expert-data-parallel group for routed experts, both divided by the data-parallel size. What it does
not get right for experts and tensor parallelism together is put right here:

* **Groups.** Ours, made by `distributed/mesh.py` with time-outs, are registered before DeepSpeed makes its own.
* **The norm.** One formula for every stage (`Engine._agree`) replaces DeepSpeed's, which miscounts experts at stage 0
  and under tensor parallelism. Non-finite norms skip the update on all ranks alike. It also replaces DeepSpeed's own
  search for overflow in bf16, which reads every gradient, and past which nobody asks for the norm.
* **Who decides.** Clipping and skipping are the device's where torch's AdamW updates ZeRO's shards there: its fused
  kernel takes both as tensors, so a step waits for nothing, and the host learns what it did when it looks
  (`StepResult`). Stage 0, other optimizers and offloaded ones leave it to the host, which waits for the norm.
* **Masters.** In bf16, DeepSpeed would start its fp32 masters from values rounded to bf16; they get the exact ones.
  Buffers stay as they were built, running statistics in fp32.
* **Refused:** bf16 at stage 0, fp32 accumulation of bf16 gradients at stage 1, offload at stage 3, fp16 (`problems`).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, nn

from megapromoe.config.deepspeed_file import load_deepspeed
from megapromoe.config.options import Config
from megapromoe.distributed.mesh import Mesh
from megapromoe.distributed.parameter_layout import ParameterLayout
from megapromoe.engine.step_result import StepResult
from megapromoe.nn.dit import DiT


class Piece(NamedTuple):
    """Elements [start, stop) of this rank's flattened parameter `name`, at [offset, ...) of a partition."""

    name: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Partition:
    """A flat fp32 tensor that this rank's optimizer updates, and which parameters lie where in it."""

    master: Tensor
    pieces: tuple[Piece, ...]


class _ExpertsHere(AutoEPMoELayer):
    """A weightless child that tells the engine that the model has expert parameters.

    The engine looks for this class and then goes by the marks on the parameters (`_mark_experts`).
    """

    def __init__(self, num_experts: int):
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, *args, **kwargs) -> None:
        """Nothing to do: the groups are registered before the engine starts."""


class _ModelParallelUnit:
    """What DeepSpeed asks of a model that brings its own tensor parallelism."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def get_model_parallel_group(self):
        return self.mesh.tp.handle

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tp.size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self):
        return self.mesh.dp.handle

    def get_data_parallel_rank(self) -> int:
        return self.mesh.dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.dp.size


def problems(ds: dict) -> list[str]:
    """What in a DeepSpeed configuration we refuse, each with the reason and what to use instead."""
    zero = ds.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    bf16 = ds.get("bf16", {}).get("enabled", False)
    wide = ds.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    found = []
    if ds.get("fp16", {}).get("enabled"):
        found.append("fp16.enabled: loss scaling is not supported; use bf16, or fp32")
    if bf16 and stage == 0:
        found.append(
            "bf16 with zero_optimization.stage 0: DeepSpeed leaves experts out of its fp32 masters' norm there;"
            " use stage 1, which costs nothing more on one data-parallel rank"
        )
    if bf16 and stage == 1 and wide:
        found.append("data_types.grad_accum_dtype fp32 with stage 1 takes another optimizer path; use stage 2")
    if stage == 3 and (zero.get("offload_optimizer") or zero.get("offload_param")):
        found.append("offload at stage 3: its gradient norm cannot be put right; use stage 2 with offload_optimizer")
    return found


class Engine:
    """A model, its optimizer and its shards, driven one optimizer step at a time."""

    def __init__(self, model: DiT, config: Config, mesh: Mesh):
        """Wraps `model` (fp32, this rank's part, with `model.layouts`). Collective.

        Raises ValueError for DeepSpeed configurations that are refused.
        """
        ds = load_deepspeed(config)
        if found := problems(ds):
            raise ValueError("; ".join(f"train.deepspeed = {config.train.deepspeed}: {p}" for p in found))
        self.config, self.mesh = config, mesh
        self.layouts: dict[str, ParameterLayout] = model.layouts
        self.stage = ds.get("zero_optimization", {}).get("stage", 0)
        self.bf16 = ds.get("bf16", {}).get("enabled", False)
        ds |= {
            "train_micro_batch_size_per_gpu": config.layout(mesh.world).micro_batch,
            "gradient_accumulation_steps": config.train.accumulation,
        }
        exact = {n: p.detach().cpu().clone() for n, p in model.named_parameters()} if self.bf16 else {}
        buffers = dict(model.named_buffers())
        _start_deepspeed()
        _register_groups(mesh)
        _mark_experts(model, mesh)
        self.names = {id(p): name for name, p in model.named_parameters()}
        optimizer = _optimizer(config, model)
        offloads = bool(ds.get("zero_optimization", {}).get("offload_optimizer"))
        self.device_decides = self.stage > 0 and config.train.optimizer == "torch" and not offloads
        ds["gradient_clipping"] = 0.0 if self.device_decides or not self.stage else config.train.clip
        self.engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=ds,
            mpu=_ModelParallelUnit(mesh),
            dist_init_required=False,
        )
        for name, buffer in buffers.items():  # DeepSpeed rounded them too, and a running mean would then stand still
            owner, _, attribute = name.rpartition(".")
            self.module.get_submodule(owner)._buffers[attribute] = buffer
        self.optimizer = optimizer  # DeepSpeed works on this very object, whatever it wraps around it
        self._announced = torch.tensor(1.0)  # the norm that DeepSpeed hears of
        if self.stage == 3:
            self.engine.optimizer._get_norm_groups = lambda: [self._announced]
        elif self.stage:
            self.engine.optimizer.scaled_global_norm = lambda *_: self._announced
            self.engine.optimizer.check_overflow = lambda **_: None
        self.partitions = tuple(self._partitions())
        once = [1 / self.copies(piece.name) for partition in self.partitions for piece in partition.pieces]
        self._once = torch.tensor(once, dtype=torch.float64, device=self.engine.device)  # weights of squared norms
        for name, value in exact.items():
            self._write_exact(name, value)
        if exact:
            self.masters_changed()

    @property
    def module(self) -> DiT:
        """The model; under stage 3 its parameters are empty outside of its own forward."""
        return self.engine.module

    def micro_step(self, *inputs, loss) -> Tensor:
        """Forward, `loss(prediction, auxiliary) -> (scalar, report)`, backward; returns the report.

        Gradients add up over `train.accumulation` calls; each counts as 1/accumulation.
        """
        prediction, auxiliary = self.engine(*inputs)
        total, report = loss(prediction, auxiliary)
        self.engine.backward(total)
        return report

    def step(self, lr: float, loss: Tensor | None = None, stop: bool = False, largest: float = math.inf) -> StepResult:
        """One AdamW update after the last micro-step, with the gradient clipped to `train.clip`.

        Where the gradient's norm is not finite, or larger than `largest`, or `loss` is not finite on any rank, no rank
        changes anything. `stop`: this rank would like to end after the step; the answer says whether any does, at the
        cost of no further collective.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        result = StepResult(self._agree(loss, stop), largest)
        if self.device_decides:
            self._decide_there(result)
        else:
            self._decide_here(result)
        self.engine.step()
        return result

    def _decide_there(self, result: StepResult) -> None:
        """Tells torch's fused AdamW by what to divide gradients, and whether to change anything."""
        clip = self.config.train.clip
        scale = ((result.norm_there + 1e-6) / clip).clamp(min=1.0) if clip else torch.ones_like(result.norm_there)
        self.optimizer.grad_scale = scale.float()
        self.optimizer.found_inf = (~result.applied_there).float()

    def _decide_here(self, result: StepResult) -> None:
        """Clips at stage 0, and tells DeepSpeed to do so at others; -1 is its sign for "skip this step"."""
        self._announced = torch.tensor(result.norm if result.applied else -1.0)
        if self.stage:
            return
        if not result.applied:  # AdamW passes over parameters without a gradient
            for p in self.module.parameters():
                p.grad = None
        elif self.config.train.clip:
            scale = min(self.config.train.clip / (result.norm + 1e-6), 1.0)
            torch._foreach_mul_([p.grad for p in self.module.parameters()], scale)

    def finish_micro_step(self) -> None:
        """Tells DeepSpeed that a micro-step before the last is over."""
        self.engine.step()

    def reduced_gradients(self) -> Iterator[tuple[Piece, Tensor]]:
        """This rank's part of the averaged gradients, between the last micro-step and the step.

        Yields:
            a piece and its gradient, flat (stop - start,).
        """
        for number, partition in enumerate(self.partitions):
            if self.stage == 0:
                gradients = [self.engine.module.get_parameter(p.name).grad.view(-1) for p in partition.pieces]
            elif self._offloads():
                flat = partition.master.grad
                gradients = [flat[p.offset : p.offset + p.stop - p.start] for p in partition.pieces]
            else:
                held = self.engine.optimizer.averaged_gradients[number]
                gradients = [g.view(-1) for g in held if not getattr(g, "_zero_padding", False)]
                gradients = gradients[: len(partition.pieces)]  # what pads the end of the last partition bears no mark
            for piece, gradient in zip(partition.pieces, gradients, strict=True):
                yield piece, gradient[: piece.stop - piece.start]

    def _agree(self, loss: Tensor | None, stop: bool) -> Tensor:
        """The sum of squares of the whole averaged gradient, and the votes to stop: (2,) float64. Collective.

        Every logical element counts once, at every stage and layout: squares are summed over all ranks' parts, each
        divided by the number of ranks that hold the same part. Not finite if any rank's loss is not.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        if loss is not None:
            total += 0.0 * loss
        norms = torch._foreach_norm([gradient for _, gradient in self.reduced_gradients()], dtype=torch.float64)
        total += torch.stack(norms).square() @ self._once
        said = torch.stack([total, torch.full_like(total, float(stop))])
        dist.all_reduce(said, group=self.mesh.whole.handle)
        return said

    def copies(self, name: str) -> int:
        """How many ranks hold the same piece of a parameter's gradient, master and moments."""
        layout = self.layouts[name]
        unsharded = layout.gradient_group(self.mesh).size if self.stage == 0 else 1
        return layout.replicas(self.mesh) * unsharded

    def is_writer(self, name: str) -> bool:
        """Of the ranks that hold the same piece of this parameter, is this the one that saves it?"""
        layout = self.layouts[name]
        first_copy = self.mesh.tp.rank == 0 or layout.replicas(self.mesh) == 1
        return first_copy and (self.stage > 0 or layout.gradient_group(self.mesh).rank == 0)

    def moments(self, partition: Partition) -> dict[str, Tensor]:
        """AdamW's `exp_avg` and `exp_avg_sq` of a partition, flat; made (zero) if there was no step yet."""
        key = self._key(partition)
        state = self.optimizer.state[key]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(key, memory_format=torch.preserve_format).detach()
        if "step" not in state and not self._steps_by_group():
            state["step"] = torch.zeros((), dtype=torch.float32, device=key.device)
        return {name: state[name].view(-1) for name in ("exp_avg", "exp_avg_sq")}

    def set_optimizer_step(self, step: int) -> None:
        """Sets AdamW's step count, on which its bias correction depends."""
        for partition in self.partitions:
            self.moments(partition)
            if not self._steps_by_group():
                self.optimizer.state[self._key(partition)]["step"].fill_(float(step))
        for group in self.optimizer.param_groups:
            if self._steps_by_group():
                group["step"] = step

    @torch.no_grad()
    def masters_changed(self) -> None:
        """After writing to masters: brings the parameters that the model computes with up to date. Collective."""
        if self.stage == 0:
            return
        zero = self.engine.optimizer
        if self.stage == 3:
            for number in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(number)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            return
        for number, partition in enumerate(self.partitions):
            group = zero.real_dp_process_group[number]
            parts = zero.parallel_partitioned_bit16_groups[number]
            mine = parts[dist.get_rank(group)]
            mine.copy_(partition.master)
            dist.all_gather(list(parts), mine.clone(), group=group)

    def close(self) -> None:
        """Frees DeepSpeed's hooks and buffers."""
        self.engine.destroy()

    def _partitions(self) -> Iterator[Partition]:
        zero = self.engine.optimizer
        if self.stage == 0:
            for name, p in self.module.named_parameters():
                yield Partition(p.data.view(-1), (Piece(name, 0, p.numel(), 0),))
        elif self.stage == 3:
            for group, master in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
                pieces, offset = [], 0
                for p in group:
                    width, rank = p.partition_numel(), dist.get_rank(p.ds_process_group)
                    start = min(rank * width, p.ds_numel)
                    pieces.append(Piece(self.names[id(p)], start, min(start + width, p.ds_numel), offset))
                    offset += width
                yield Partition(master, tuple(pieces))
        else:
            for number, master in enumerate(zero.single_partition_of_fp32_groups):
                width = zero.partition_size[number]
                first = dist.get_rank(zero.real_dp_process_group[number]) * width
                pieces = []
                held = zip(zero.round_robin_bit16_groups[number], zero.round_robin_bit16_offsets[number], strict=True)
                for p, place in held:
                    start, stop = max(first - place, 0), min(first + width - place, p.numel())
                    if start < stop:
                        pieces.append(Piece(self.names[id(p)], start, stop, place + start - first))
                yield Partition(master, tuple(pieces))

    @torch.no_grad()
    def _write_exact(self, name: str, value: Tensor) -> None:
        for partition in self.partitions:
            for piece in partition.pieces:
                if piece.name == name:
                    here = partition.master[piece.offset : piece.offset + piece.stop - piece.start]
                    here.copy_(value.view(-1)[piece.start : piece.stop])

    def _key(self, partition: Partition) -> Tensor:
        # At stage 0 the optimizer steps the parameters themselves, of which the partition is a view.
        return self.module.get_parameter(partition.pieces[0].name) if self.stage == 0 else partition.master

    def _offloads(self) -> bool:
        return self.stage in (1, 2) and self.engine.optimizer.cpu_offload

    def _steps_by_group(self) -> bool:
        return self.config.train.optimizer != "torch"


def _start_deepspeed() -> None:
    """Lets DeepSpeed's wrappers join the running torch.distributed job."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Its shared-memory collectives compile C++ at every start on a CPU and gain nothing here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    # It still calls collectives by their former names, hundreds of times a start.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


def _register_groups(mesh: Mesh) -> None:
    """Hands our expert groups to DeepSpeed, which would make its own, of other ranks and without time-outs."""
    name = f"ep_size_{mesh.ep.size}"
    for table in (
        deepspeed_groups._EXPERT_PARALLEL_GROUP,
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP,
        deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS,
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ):
        table.clear()
    deepspeed_groups._EXPERT_PARALLEL_GROUP[name] = mesh.ep.handle
    deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS[name] = list(mesh.ep.ranks)
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.edp.handle
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(mesh.edp.ranks)


def _mark_experts(model: DiT, mesh: Mesh) -> None:
    """Marks routed experts so that the engine reduces and shards them over the expert-data-parallel group."""
    name = f"ep_size_{mesh.ep.size}"
    found = False
    for parameter_name, parameter in model.named_parameters():
        if model.layouts[parameter_name].expert:
            found = True
            parameter.allreduce = False
            parameter.group_name = name
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = name
    if found:
        model.add_module("experts_here", _ExpertsHere(model.config.num_experts))


def _optimizer(config: Config, model: DiT) -> torch.optim.Optimizer:
    """AdamW over parameter groups that keep experts apart, as the engine wants them."""
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "dense"})
    t = config.train
    settings = {"lr": t.lr, "betas": (t.beta1, t.beta2), "eps": t.eps, "weight_decay": t.weight_decay}
    if t.optimizer == "torch":
        return torch.optim.AdamW(groups, fused=True, **settings)
    if t.optimizer == "apex":
        try:
            from apex.optimizers import FusedAdam
        except ImportError as error:
            raise ValueError(
                "train.optimizer = apex: NVIDIA apex is not installed (it is not the PyPI project of that name);"
                " install it from its repository, or use train.optimizer=torch"
            ) from error
        return FusedAdam(groups, adam_w_mode=True, **settings)
    if not torch.cuda.is_available():
        raise ValueError("train.optimizer = deepspeed: its FusedAdam needs a GPU; use train.optimizer=torch")
    return deepspeed.ops.adam.FusedAdam(groups, adam_w_mode=True, **settings)
