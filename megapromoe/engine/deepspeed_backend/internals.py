"""The undocumented names of DeepSpeed that this folder uses, and the check that the installed version has them.

They are those of 0.19.8. The adapter refuses to start if one is missing. Comments in the other files give the reason
for each use.
"""

from __future__ import annotations

from typing import Any

import deepspeed
from deepspeed.runtime import compiler as deepspeed_compiler
from deepspeed.utils import groups as deepspeed_groups
from packaging.version import Version
from torch import nn

from megapromoe.engine.protocol import EngineError

SUPPORTED = "deepspeed>=0.19.8,<0.20"
GROUP_TABLES = (
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
    "communication_data_type",
    "copy_grads_in_partition",
    "cpu_offload",
    "dtype",
    "gradient_accumulation_dtype",
    "grads_in_partition",
    "grads_in_partition_offset",
    "is_gradient_accumulation_boundary",
    "micro_step_id",
    "nccl_start_alignment_factor",
    "overlap_comm",
    "overlapping_partition_gradients_reduce_epilogue",
    "parallel_partitioned_bit16_groups",
    "params_in_partition",
    "partition_gradients",
    "partition_size",
    "process_gradients",
    "real_dp_process_group",
    "reduce_gradients",
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
PARAMETER_INTERNALS = ("ds_numel", "ds_process_group", "partition_numel")  # of a parameter at stage 3


def check_version(version: str) -> None:
    """Raises EngineError for a version of DeepSpeed with other internals than this folder needs."""
    if not Version("0.19.8") <= Version(version) < Version("0.20.dev0"):
        raise EngineError(
            f"DeepSpeed {version} is installed, but training relies on internals of 0.19.8 to 0.19.x;"
            f" install a supported version: pip install '{SUPPORTED}'"
        )


def missing_internals(stage: int, zero: Any, parameter: nn.Parameter) -> list[str]:
    """The names that this folder needs and the installed DeepSpeed does not have.

    Args:
        stage: of ZeRO.
        zero: the optimizer wrapper of a running engine.
        parameter: any of its parameters.
    """
    expected: list[tuple[Any, str, tuple[str, ...]]] = [
        (deepspeed_groups, "deepspeed.utils.groups", GROUP_TABLES),
        (deepspeed.ops, "deepspeed.ops", ("__compatible_ops__",)),
        (deepspeed_compiler, "deepspeed.runtime.compiler", ("compile",)),
        (zero, type(zero).__name__, INTERNALS[stage]),
        (parameter, "parameters of ZeRO-3", PARAMETER_INTERNALS if stage == 3 else ()),
    ]
    return [f"{label}.{name}" for owner, label, names in expected for name in names if not hasattr(owner, name)]
