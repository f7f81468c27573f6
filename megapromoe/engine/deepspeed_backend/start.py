"""Starts DeepSpeed's engine: its job, its groups, the marks of experts, and the optimizer that it wraps."""

from __future__ import annotations

import importlib
import logging
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler as deepspeed_compiler
from deepspeed.utils import groups as deepspeed_groups
from torch import nn

from megapromoe.config.options import Config
from megapromoe.config.train_options import TrainConfig
from megapromoe.distributed.mesh import Mesh
from megapromoe.engine.deepspeed_backend.internals import GROUP_TABLES, check_version
from megapromoe.engine.eager_adamw import EagerAdamW
from megapromoe.engine.muon import HIDDEN_MATRICES, MuonAndAdamW, hidden_parameters
from megapromoe.engine.protocol import EngineError
from megapromoe.nn.dit import DiT
from megapromoe.planning.cost import OUTSIDE
from megapromoe.planning.zero import consecutive_groups, largest_group

check_version(deepspeed.__version__)  # before the imports that other versions lack

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer  # noqa: E402
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer  # noqa: E402


class ExpertMarker(AutoEPMoELayer):
    """A module without weights that makes DeepSpeed treat the model as one with expert parameters.

    0.19.8 searches the model for an instance of its base class (`DeepSpeedEngine._configure_distributed_model`). It
    then uses the attributes that `mark_experts` sets on parameters.
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

    # 0.19.8 divides optimizer states over the group that these methods give, in place of the data-parallel group.
    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.mesh.shard_group(expert=False).process_group

    def get_sequence_data_parallel_rank(self) -> int:
        return self.mesh.shard_group(expert=False).rank

    def get_sequence_data_parallel_world_size(self) -> int:
        return self.mesh.shard_group(expert=False).size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.mesh.dp.process_group

    def get_data_parallel_rank(self) -> int:
        return self.mesh.dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.dp.size


def start_engine(config: Config, model: DiT, optimizer: torch.optim.Optimizer, mesh: Mesh, settings: dict[str, Any]):
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
    # 0.19.8 warns of an optimizer that is neither torch's nor its own; tests/parallel/test_muon_training.py tests ours.
    deepspeed.utils.logger.addFilter(_is_of_interest)
    # 0.19.8 would compile its shared-memory collectives at every start on a CPU, and crash without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    # 0.19.8 calls collectives by deprecated names, which would print hundreds of warnings.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


def _is_of_interest(record: logging.LogRecord) -> bool:
    """Whether a message of DeepSpeed is to be logged. A function of the module, which a logger adds only once."""
    return "untested optimizer" not in record.getMessage()


def register_groups(mesh: Mesh) -> None:
    """Registers the expert groups of the mesh in DeepSpeed's tables: those over which it divides optimizer states.

    Otherwise 0.19.8 would make groups with other ranks and without timeouts. It uses the groups that these tables have
    under the name of the expert-parallel size.
    """
    name, shards = f"ep_size_{mesh.ep.size}", mesh.shard_group(expert=True)
    for table in GROUP_TABLES:
        getattr(deepspeed_groups, table).clear()
    deepspeed_groups._EXPERT_PARALLEL_GROUP[name] = mesh.ep.process_group
    deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS[name] = list(mesh.ep.ranks)
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = shards.process_group
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(shards.ranks)


def mark_experts(model: DiT, mesh: Mesh) -> None:
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


def make_optimizer(config: Config, model: DiT, mesh: Mesh) -> torch.optim.Optimizer:
    """The optimizer `train.optimizer`, with parameter groups of their own for experts, which 0.19.8 requires.

    Raises EngineError if its backend cannot run on this machine.
    """
    hidden = hidden_parameters(config, model.layouts)
    of_adamw = [p for name, p in model.named_parameters() if name not in hidden]
    of_muon = [p for name, p in model.named_parameters() if name in hidden]
    groups: list[dict[str, Any]] = [{"params": of_adamw, "name": "dense"}]
    if of_muon:
        groups.append({"params": of_muon, "name": "hidden matrices", HIDDEN_MATRICES: True})
    # Experts in groups of their own. 0.19.8 would also limit their size, but makes an empty group, on which it fails,
    # before a parameter that is larger than the limit.
    groups = split_params_into_different_moe_groups_for_optimizer(groups, max_group_size=None)
    groups = [part for group in groups if group["params"] for part in _divided(config, model, mesh, group)]
    make = {"adamw": _make_adamw, "muon": _make_muon}[config.train.optimizer]
    return make(config.train, groups)


def _divided(config: Config, model: DiT, mesh: Mesh, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Divides a parameter group into groups of at most `largest_group` elements, in the order of `tensors_on_rank`.

    Parameters outside of blocks come first: the first and the last ones of the forward pass, in whose group gradients
    wait until the backward pass ends.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def position(parameter: nn.Parameter) -> tuple[int, int]:
        part, _, rest = names[id(parameter)].partition(".")
        return (int(rest.partition(".")[0]) if part == "blocks" else OUTSIDE), -parameter.numel()

    parameters = sorted(group["params"], key=position)
    routed = bool(group.get("moe"))
    largest = largest_group(config, routed, (mesh.edp if routed else mesh.dp).size)
    for numbers in consecutive_groups([parameter.numel() for parameter in parameters], largest):
        yield {**group, "params": parameters[numbers.start : numbers.stop]}


def _make_muon(t: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Muon for groups of hidden matrices, torch's fused AdamW for all others."""
    betas = (t.beta1, t.beta2)
    return MuonAndAdamW(groups, fused=True, lr=t.lr, betas=betas, eps=t.eps, weight_decay=t.weight_decay)


def _make_adamw(t: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Fused AdamW of `train.adamw_backend`. Raises EngineError if the backend cannot run on this machine.

    For "fused" it is torch's too, as the owner of groups and states; its `step` is not called.
    """
    betas = (t.beta1, t.beta2)
    if t.adamw_backend in ("torch", "fused"):
        return EagerAdamW(groups, fused=True, lr=t.lr, betas=betas, eps=t.eps, weight_decay=t.weight_decay)
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
