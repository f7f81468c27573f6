"""DeepSpeed as a `ShardedBackend`. Everything that depends on DeepSpeed's internals is in this file.

It was written for DeepSpeed 0.19.8. `INTERNALS` lists the undocumented names that it uses; the adapter refuses to start
if one is missing. The comments give the reason for each use.
"""

from __future__ import annotations

import importlib
import logging
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch._dynamo  # noqa: F401, by the first step of a torch optimizer; imported here without garbage collection
import torch.distributed as dist
from deepspeed.runtime import compiler as deepspeed_compiler
from deepspeed.utils import groups as deepspeed_groups
from packaging.version import Version
from torch import Tensor, nn

from megapromoe.config.options import Config, TrainConfig
from megapromoe.distributed.mesh import Mesh
from megapromoe.engine.protocol import EngineError, Partition, PartitionUpdate, Piece
from megapromoe.nn.dit import DiT

SUPPORTED = "deepspeed>=0.19.8,<0.20"


def check_version(version: str) -> None:
    """Raises EngineError for a version of DeepSpeed with other internals than this file needs."""
    if not Version("0.19.8") <= Version(version) < Version("0.20.dev0"):
        raise EngineError(
            f"DeepSpeed {version} is installed, but training relies on internals of 0.19.8 to 0.19.x;"
            f" install a supported version: pip install '{SUPPORTED}'"
        )


check_version(deepspeed.__version__)  # before the imports that other versions lack

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer  # noqa: E402
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer  # noqa: E402
from deepspeed.runtime.utils import all_gather_dp_groups  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID  # noqa: E402

_GROUP_TABLES = (
    "_EXPERT_PARALLEL_GROUP",
    "_EXPERT_PARALLEL_GROUP_RANKS",
    "_EXPERT_DATA_PARALLEL_GROUP",
    "_EXPERT_DATA_PARALLEL_GROUP_RANKS",
)
_ZERO_1_AND_2 = (  # DeepSpeedZeroOptimizer, deepspeed/runtime/zero/stage_1_and_2.py
    "all_grad_tensors",
    "allgather_bucket_size",
    "averaged_gradients",
    "bit16_groups_flat",
    "check_overflow",
    "copy_grads_in_partition",
    "cpu_offload",
    "dtype",
    "grads_in_partition",
    "grads_in_partition_offset",
    "micro_step_id",
    "nccl_start_alignment_factor",
    "parallel_partitioned_bit16_groups",
    "params_in_partition",
    "partition_size",
    "real_dp_process_group",
    "round_robin_bit16_groups",
    "round_robin_bit16_offsets",
    "scaled_global_norm",
    "single_partition_of_fp32_groups",
    "step",
)
_ZERO_3 = (  # DeepSpeedZeroOptimizer_Stage3, deepspeed/runtime/zero/stage3.py
    "_get_norm_groups",
    "_partition_all_parameters",
    "_post_step",
    "_pre_step",
    "_reassign_or_swap_out_partitioned_parameters",
    "_unflatten_partitioned_parameters",
    "averaged_gradients",
    "fp16_groups",
    "fp16_partitioned_groups_flat",
    "fp32_partitioned_groups_flat",
    "persistent_parameters",
    "step",
    "sub_group_to_group_id",
    "zero_grad",
)
# Attributes of the optimizer wrapper of each ZeRO stage; at stage 0 the wrapper is not touched.
INTERNALS: dict[int, tuple[str, ...]] = {0: (), 1: _ZERO_1_AND_2, 2: _ZERO_1_AND_2, 3: _ZERO_3}
GATHERED = 1 << 22  # elements that one collective gathers when parameters are set from masters
PARAMETER_INTERNALS = ("ds_numel", "ds_process_group", "partition_numel")  # of a parameter at stage 3


class ExpertMarker(AutoEPMoELayer):
    """A module without weights that makes DeepSpeed treat the model as one with expert parameters.

    0.19.8 searches the model for an instance of its base class (`DeepSpeedEngine._configure_distributed_model`). It
    then uses the attributes that `_mark_experts` sets on parameters.
    """

    def __init__(self, num_experts: int):
        nn.Module.__init__(self)  # skips the __init__ of the base class, which makes a router and experts
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, *args, **kwargs) -> None:
        """Does nothing: the groups are registered before the engine starts."""


class ModelParallelUnit:
    """The `mpu` argument of `deepspeed.initialize`: the groups of a model with its own tensor parallelism."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.mesh.tp.process_group

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tp.size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.mesh.dp.process_group

    def get_data_parallel_rank(self) -> int:
        return self.mesh.dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.dp.size


class DeepSpeedAdapter:
    """Implements `ShardedBackend` with DeepSpeed's engine and its ZeRO optimizers."""

    def __init__(self, model: DiT, config: Config, mesh: Mesh, ds: dict[str, Any], clip: float):
        """Starts DeepSpeed's engine. Collective.

        Args:
            model: float32, this rank's part, with `model.layouts`.
            ds: content of the file that `train.deepspeed` names.
            clip: the norm to which `step` clips gradients, measured by `reported_norm`; 0 to not clip.

        Raises EngineError if the optimizer cannot run on this machine, if DeepSpeed refuses `ds`, or if it lacks one of
        `INTERNALS`.
        """
        join_job()
        _register_groups(mesh)
        _mark_experts(model, mesh)
        self._names = {id(p): name for name, p in model.named_parameters()}
        self.optimizer = _make_optimizer(config, model)  # DeepSpeed wraps this object and calls its step
        settings = {
            **ds,
            "train_micro_batch_size_per_gpu": config.layout(mesh.world_size).micro_batch,
            "gradient_accumulation_steps": config.train.accumulation,
            "gradient_clipping": clip,  # always set, because the default of 0.19.8 is 1.0
        }
        self._engine = _start_engine(config, model, self.optimizer, mesh, settings)
        self._stage: int = ds.get("zero_optimization", {}).get("stage", 0)
        if missing := self.missing_internals():
            raise EngineError(
                f"DeepSpeed {deepspeed.__version__} lacks {', '.join(missing)}, on which training relies;"
                f" install a supported version: pip install '{SUPPORTED}'"
            )
        self.reported_norm = torch.tensor(1.0)
        self._replace_norm()
        self.partitions = tuple(self._make_partitions())
        self._update: PartitionUpdate | None = None
        if config.train.adamw_backend == "fused":
            self._replace_step()

    def missing_internals(self) -> list[str]:
        """The names that this file needs and the installed DeepSpeed does not have; needs a running engine."""
        zero = self._engine.optimizer
        parameter = next(iter(self.module.parameters()))
        expected: list[tuple[Any, str, tuple[str, ...]]] = [
            (deepspeed_groups, "deepspeed.utils.groups", _GROUP_TABLES),
            (deepspeed.ops, "deepspeed.ops", ("__compatible_ops__",)),
            (deepspeed_compiler, "deepspeed.runtime.compiler", ("compile",)),
            (zero, type(zero).__name__, INTERNALS[self._stage]),
            (parameter, "parameters of ZeRO-3", PARAMETER_INTERNALS if self._stage == 3 else ()),
        ]
        return [f"{label}.{name}" for owner, label, names in expected for name in names if not hasattr(owner, name)]

    @property
    def device(self) -> torch.device:
        return self._engine.device

    @property
    def module(self) -> DiT:
        return self._engine.module

    def forward(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        self._engine.step()

    def step_by_partitions(self, update: PartitionUpdate) -> None:
        self._update = update
        self._engine.step()

    def parameter_group(self, partition: int) -> dict[str, Any]:
        zero = self._engine.optimizer
        return self.optimizer.param_groups[zero.sub_group_to_group_id[partition] if self._stage == 3 else partition]

    def gradients(self, partition: int) -> list[Tensor]:
        pieces = self.partitions[partition].pieces
        zero = self._engine.optimizer
        if self._stage == 0:
            gradient = self.partitions[partition].optimized.grad
            assert gradient is not None, f"no gradient of {pieces[0].name}: every parameter must be used in every step"
            return [gradient.view(-1)]
        if self._stage < 3 and zero.cpu_offload:
            # 0.19.8 has copied the gradients into that of the master partition, on the host.
            flat = self.partitions[partition].master.grad
            assert flat is not None, "DeepSpeed made no gradient of an offloaded partition"
            return [flat[p.offset : p.offset + p.stop - p.start] for p in pieces]
        # 0.19.8 keeps a list for each parameter group (stage 3: sub-group), in the order of its parameters. Padding
        # between parameters is marked, padding at the end of the last partition is not.
        kept = [g.view(-1) for g in zero.averaged_gradients[partition] if not getattr(g, "_zero_padding", False)]
        return kept[: len(pieces)]

    @torch.no_grad()
    def sync_parameters_from_masters(self) -> None:
        zero = self._engine.optimizer
        if self._stage == 0:
            return
        if self._stage == 3:
            # As `step` of 0.19.8 does around the optimizer. Small parameters are kept gathered, and `all_gather` leaves
            # out those that are gathered already.
            if zero.persistent_parameters:
                zero.persistent_parameters[0].partition(zero.persistent_parameters)
            for number in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(number)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            return
        # The bf16 parameters of a group are views of one flat tensor; `shards` are its parts by data-parallel rank.
        for number, partition in enumerate(self.partitions):
            group = zero.real_dp_process_group[number]
            shards = zero.parallel_partitioned_bit16_groups[number]
            shard = shards[dist.get_rank(group)]
            shard.copy_(partition.master)
            size = max(GATHERED // len(shards), 1)
            for start in range(0, shard.numel(), size):  # gloo and NCCL keep a copy of what one call gathers
                part = slice(start, start + size)
                dist.all_gather([other[part] for other in shards], shard[part].clone(), group=group)

    def close(self) -> None:
        self._engine.destroy()

    def _replace_norm(self) -> None:
        """Replaces DeepSpeed's gradient norm by `reported_norm`, and turns off its overflow scan.

        `step` of 0.19.8 clips by the value that these methods return, and skips the update if it is -1. Its own norm
        counts experts wrongly with tensor parallelism. Its overflow scan reads every gradient again, and would skip the
        norm after an overflow.
        """
        zero = self._engine.optimizer
        if self._stage == 3:
            zero._get_norm_groups = lambda: [self.reported_norm]
        elif self._stage:
            zero.scaled_global_norm = lambda *_: self.reported_norm
            zero.check_overflow = lambda **_: None

    def _replace_step(self) -> None:
        """Replaces the step of DeepSpeed's optimizer, which joins, casts, scales and copies in passes of their own."""
        zero = self._engine.optimizer
        if self._stage == 3:
            zero.step = self._step_of_stage_3
        else:
            self._order_gradients()
            zero.step = self._step_of_stages_1_and_2

    def _order_gradients(self) -> None:
        """Makes reduced gradients lie in memory in the order of the partitions, so that nothing has to join them.

        0.19.8 copies those of this rank's partitions into one tensor for each micro-step, in the order in which they
        are reduced: each to the offset at which the one before it ended. This sets tensor and offset before each copy.
        """
        zero = self._engine.optimizer
        offsets, total = {}, 0
        for parameters in zero.params_in_partition:
            for p in parameters:
                offsets[id(p)], total = total, total + p.numel()
        copy = zero.copy_grads_in_partition

        def copy_in_order(parameter: nn.Parameter, group: int | None = None) -> None:
            if zero.grads_in_partition is None:
                zero.grads_in_partition = torch.empty(total, dtype=zero.dtype, device=self.device)
            zero.grads_in_partition_offset = offsets[id(parameter)]
            copy(parameter, group)

        zero.copy_grads_in_partition = copy_in_order

    def _step_of_stages_1_and_2(self) -> None:
        """As `step` of 0.19.8 without offloading, with `_update` in place of the optimizer and the passes around it."""
        assert self._update is not None, "DeepSpeed's optimizer made a step of its own"
        zero = self._engine.optimizer
        zero.micro_step_id = INITIAL_MICRO_STEP_ID
        for number, partition in enumerate(self.partitions):
            # Tensors after the last piece are padding, and so are those that 0.19.8 puts between parameters.
            stop = max((p.offset + p.stop - p.start for p in partition.pieces), default=0)
            shard = zero.parallel_partitioned_bit16_groups[number][dist.get_rank(zero.real_dp_process_group[number])]
            if stop:
                self._update(number, joined(zero.averaged_gradients[number], stop), shard)
            zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )

    def _step_of_stage_3(self) -> None:
        """The same for stage 3. Its gradients are parts of one tensor, in the order of the partitions."""
        assert self._update is not None, "DeepSpeed's optimizer made a step of its own"
        zero = self._engine.optimizer
        zero._pre_step()
        zero._partition_all_parameters()
        zero.zero_grad(set_to_none=True)
        for number, partition in enumerate(self.partitions):
            gradient = joined(zero.averaged_gradients[number], partition.master.numel())
            self._update(number, gradient, zero.fp16_partitioned_groups_flat[number])
            zero.averaged_gradients[number] = None
            zero._unflatten_partitioned_parameters(number)
        zero._post_step(set())

    def _make_partitions(self) -> Iterator[Partition]:
        zero = self._engine.optimizer
        if self._stage == 0:
            for name, p in self.module.named_parameters():
                yield Partition(p.data.view(-1), (Piece(name, 0, p.numel(), 0),), optimized=p)
        elif self._stage == 3:
            # Each parameter is padded to a multiple of the number of ranks and sharded; the shards of a sub-group are
            # contiguous in its partition.
            for group, master in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
                pieces, offset = [], 0
                for p in group:
                    width, rank = p.partition_numel(), dist.get_rank(p.ds_process_group)
                    start = min(rank * width, p.ds_numel)
                    pieces.append(Piece(self._names[id(p)], start, min(start + width, p.ds_numel), offset))
                    offset += width
                yield Partition(master, tuple(pieces), optimized=master)
        else:
            # The parameters of a group are contiguous, with padding for alignment, and split into equal partitions.
            for number, master in enumerate(zero.single_partition_of_fp32_groups):
                width = zero.partition_size[number]
                first = dist.get_rank(zero.real_dp_process_group[number]) * width
                pieces = []
                parameters, offsets = zero.round_robin_bit16_groups[number], zero.round_robin_bit16_offsets[number]
                for p, begin in zip(parameters, offsets, strict=True):
                    start, stop = max(first - begin, 0), min(first + width - begin, p.numel())
                    if start < stop:
                        pieces.append(Piece(self._names[id(p)], start, stop, begin + start - first))
                yield Partition(master, tuple(pieces), optimized=master)


def joined(tensors: Sequence[Tensor], count: int) -> Tensor:
    """The first `count` elements of flattened tensors: a view if they follow each other in memory, else a copy."""
    flat, total = [], 0
    for tensor in tensors:
        if total < count:
            flat.append(tensor.reshape(-1)[: count - total])
            total += flat[-1].numel()
    assert total == count, f"{total} of {count} elements have a gradient"
    first, address = flat[0], flat[0].data_ptr()
    for tensor in flat:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or tensor.data_ptr() != address or tensor.dtype != first.dtype:
            return torch.cat(flat)
        address += tensor.numel() * tensor.element_size()
    return first.as_strided((count,), (1,))


def _start_engine(config: Config, model: DiT, optimizer: torch.optim.Optimizer, mesh: Mesh, settings: dict[str, Any]):
    """Starts DeepSpeed's engine. Raises EngineError with the reason if DeepSpeed refuses its settings.

    DeepSpeed checks them in many places, with assertions and errors of every class. So every error except those of
    memory and communication is reported as a refusal.
    """
    import_muon()
    try:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=ModelParallelUnit(mesh), dist_init_required=False
        )
    except (torch.OutOfMemoryError, MemoryError, dist.DistError):
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        last = next((frame for frame in reversed(frames) if "/deepspeed/" in frame.filename), frames[-1])
        place = f"{'/'.join(Path(last.filename).parts[-3:])}:{last.lineno}"
        reason = " ".join(str(error).split())[:500] or "no reason given"
        raise EngineError(
            f"train.deepspeed = {config.train.deepspeed!r}: DeepSpeed {deepspeed.__version__} does not start with this"
            f" file: {type(error).__name__}: {reason} ({place}); remove the key that it"
            " names, or start from a file of ds_configs/"
        ) from error
    return engine


def import_muon() -> None:
    """Imports the module of Muon, an optimizer that is not used, without torch's compiler.

    0.19.8 imports it at every start to ask whether the optimizer is Muon. The module decorates functions with
    `compiler.compile()`, for which torch imports Inductor: more than a second on each rank.
    """
    real = deepspeed_compiler.compile
    deepspeed_compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        deepspeed_compiler.compile = real


def join_job() -> None:
    """Makes DeepSpeed use the running torch.distributed job."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # 0.19.8 would compile its shared-memory collectives at every start on a CPU, and crash without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    # 0.19.8 calls collectives by deprecated names, which would print hundreds of warnings.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


def _register_groups(mesh: Mesh) -> None:
    """Registers the expert groups of the mesh in DeepSpeed's tables.

    Otherwise 0.19.8 would make groups with other ranks and without timeouts. It uses the groups that these tables have
    under the name of the expert-parallel size.
    """
    name = f"ep_size_{mesh.ep.size}"
    for table in _GROUP_TABLES:
        getattr(deepspeed_groups, table).clear()
    deepspeed_groups._EXPERT_PARALLEL_GROUP[name] = mesh.ep.process_group
    deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS[name] = list(mesh.ep.ranks)
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.edp.process_group
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(mesh.edp.ranks)


def _mark_experts(model: DiT, mesh: Mesh) -> None:
    """Marks routed experts, so that DeepSpeed reduces and shards them over the expert-data-parallel group.

    It reads `allreduce` and `group_name` at stages 1 and 2, the two other attributes at stage 3.
    """
    name = f"ep_size_{mesh.ep.size}"
    marks = {
        "allreduce": False,
        "group_name": name,
        "ds_zero_placement_family": "autoep_expert",
        "ds_zero_partition_group_name": name,
    }
    experts = [p for parameter_name, p in model.named_parameters() if model.layouts[parameter_name].expert]
    for parameter in experts:
        for attribute, value in marks.items():
            setattr(parameter, attribute, value)
    if experts:
        model.add_module("deepspeed_expert_marker", ExpertMarker(model.config.num_experts))


def _make_optimizer(config: Config, model: DiT) -> torch.optim.Optimizer:
    """The optimizer `train.optimizer`, with parameter groups of their own for experts, which 0.19.8 requires.

    Raises EngineError if its backend cannot run on this machine.
    """
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "dense"})
    make = {"adamw": _make_adamw}[config.train.optimizer]
    return make(config.train, groups)


def _make_adamw(t: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Fused AdamW of `train.adamw_backend`. Raises EngineError if the backend cannot run on this machine.

    For "fused" it is torch's too, as the owner of groups and states; its `step` is not called.
    """
    betas = (t.beta1, t.beta2)
    if t.adamw_backend in ("torch", "fused"):
        return torch.optim.AdamW(groups, fused=True, lr=t.lr, betas=betas, eps=t.eps, weight_decay=t.weight_decay)
    if t.adamw_backend == "apex":
        try:
            from apex.optimizers import FusedAdam
        except ImportError as error:
            raise EngineError(
                "train.adamw_backend = apex: NVIDIA apex is not installed (it is not the PyPI project of that name);"
                " install it from its repository, or use train.adamw_backend=torch"
            ) from error
    else:
        if not torch.cuda.is_available():
            raise EngineError(
                "train.adamw_backend = deepspeed: its FusedAdam needs a GPU; use train.adamw_backend=torch"
            )
        FusedAdam = deepspeed.ops.adam.FusedAdam
    return FusedAdam(groups, adam_w_mode=True, lr=t.lr, betas=betas, eps=t.eps, weight_decay=t.weight_decay)
