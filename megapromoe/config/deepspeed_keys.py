"""The keys of DeepSpeed's JSON: which ones are supported, with which values, and why the others are refused.

DeepSpeed 0.19.8 ignores a misspelt key at the top of the file. Several of its features either fail on every rank after
the process group has been initialized, or change the gradients without a message. Only tested keys are supported:
`tests/parallel/test_deepspeed_keys.py` trains with each of them and compares the result with that of a plain file. It
also checks that the tables of this file together hold every key that the installed DeepSpeed reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Key(NamedTuple):
    """A key that training supports.

    Attributes:
        kind: bool, int (a whole float such as 5e8 is one too), str, or dict for a block of keys.
        low: the smallest valid number.
        choices: the valid values, where these are few.
        optional: null is allowed, and means DeepSpeed's default.
    """

    kind: type
    low: int = 0
    choices: tuple[Any, ...] = ()
    optional: bool = False


class Refused(NamedTuple):
    """A key of DeepSpeed's that training does not support.

    Attributes:
        reason: why, as a clause.
        remedy: what to do instead, as a clause.
        off: values with which the key has no effect; see `has_no_effect`.
        always: DeepSpeed refuses the key with any value.
    """

    reason: str
    remedy: str = "remove it"
    off: tuple[Any, ...] = (False,)
    always: bool = False


ZERO = "zero_optimization"
OFFLOAD = f"{ZERO}.offload_optimizer"
_BLOCK, _FLAG, _COUNT, _SIZE, _TEXT = Key(dict), Key(bool), Key(int), Key(int, low=1), Key(str)

# By dotted name.
SUPPORTED: dict[str, Key] = {
    "bf16": _BLOCK,
    "bf16.enabled": _FLAG,
    "bf16.check_grad_overflow": _FLAG,
    ZERO: _BLOCK,
    f"{ZERO}.stage": Key(int, choices=(0, 1, 2, 3)),
    f"{ZERO}.contiguous_gradients": _FLAG,
    f"{ZERO}.reduce_scatter": _FLAG,
    f"{ZERO}.reduce_bucket_size": _SIZE,
    f"{ZERO}.use_multi_rank_bucket_allreduce": _FLAG,
    f"{ZERO}.allgather_partitions": _FLAG,
    f"{ZERO}.allgather_bucket_size": _SIZE,
    f"{ZERO}.overlap_comm": Key(bool, optional=True),
    f"{ZERO}.round_robin_gradients": _FLAG,
    f"{ZERO}.parameter_alignment": _FLAG,
    f"{ZERO}.ignore_unused_parameters": _FLAG,
    f"{ZERO}.sub_group_size": _SIZE,
    f"{ZERO}.stage3_prefetch_bucket_size": _COUNT,
    f"{ZERO}.stage3_param_persistence_threshold": _COUNT,
    f"{ZERO}.stage3_model_persistence_threshold": _COUNT,
    f"{ZERO}.stage3_max_live_parameters": _COUNT,
    f"{ZERO}.stage3_max_reuse_distance": _COUNT,
    f"{ZERO}.stage3_use_all_reduce_for_fetch_params": _FLAG,
    f"{ZERO}.stage3_allgather_sequential": _FLAG,
    f"{ZERO}.memory_efficient_linear": _FLAG,
    f"{ZERO}.override_module_apply": _FLAG,
    f"{ZERO}.log_trace_cache_warnings": _FLAG,
    f"{ZERO}.enable_sanity_checks": _FLAG,
    OFFLOAD: Key(dict, optional=True),
    f"{OFFLOAD}.device": Key(str, choices=("none", "cpu")),
    f"{OFFLOAD}.pin_memory": _FLAG,
    "data_types": _BLOCK,
    "data_types.grad_accum_dtype": Key(str, choices=("fp32", "bf16"), optional=True),
    "communication_data_type": Key(str, choices=("fp32", "bf16"), optional=True),
    "zero_allow_untested_optimizer": _FLAG,
    "zero_force_ds_cpu_optimizer": _FLAG,
    "steps_per_print": _SIZE,
    "wall_clock_breakdown": _FLAG,
    "memory_breakdown": _FLAG,
    "dump_state": _FLAG,
    "comms_logger": _BLOCK,
    "comms_logger.enabled": _FLAG,
    "comms_logger.prof_all": _FLAG,
    "comms_logger.verbose": _FLAG,
    "comms_logger.debug": _FLAG,
    "timers": _BLOCK,
    "timers.throughput": _BLOCK,
    "timers.throughput.enabled": _FLAG,
    "timers.throughput.synchronized": _FLAG,
    "flops_profiler": _BLOCK,
    "flops_profiler.enabled": _FLAG,
    "flops_profiler.profile_step": _SIZE,
    "flops_profiler.module_depth": Key(int, low=-1),
    "flops_profiler.top_modules": _SIZE,
    "flops_profiler.detailed": _FLAG,
    "flops_profiler.output_file": Key(str, optional=True),
    **{
        f"{monitor}{key}": kind
        for monitor in ("tensorboard", "csv_monitor")
        for key, kind in (("", _BLOCK), (".enabled", _FLAG), (".output_path", _TEXT), (".job_name", _TEXT))
    },
}

# Keys that the configuration of the run sets; the option to set instead.
OURS: dict[str, str] = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.global_batch and train.accumulation",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optimizer, train.lr, ...",
    "scheduler": "train.schedule, train.warmup, ...",
    "expert_parallel": "parallel.ep",
    "tensor_parallel": "parallel.tp",
}

_REMOVED = "DeepSpeed 0.19.8 no longer supports it, and raises an error"
_ITS_OWN_CHECKPOINT = (
    "is for DeepSpeed's own checkpoints, which are not used; a run writes its checkpoints in another format"
)
_ITS_OWN_DATA = "is for DeepSpeed's own data loader, which is not used"
_ITS_OWN_METRICS = "is not used: a run writes metrics.jsonl and TensorBoard files"
_TYPES = "parameters are fp32, or bf16 with 'bf16', and buffers are fp32"
_LOW_PRECISION = "would keep the fp32 masters, from which checkpoints are made, in bf16"
_GRADIENT = "changes what gradients are divided by, on which the gradient norm and clipping rely"
_QUANTIZED = "quantizes what ranks exchange, which does not work with expert parameters"
_NVME = "is for offload to NVMe, which is not supported"

REFUSED: dict[str, Refused] = {
    "bfloat16": Refused("is the old spelling, which the planner does not read", "write 'bf16'"),
    "bf16.immediate_grad_update": Refused("belongs to an optimizer path that is not supported"),
    "bf16.bf16_master_weights_and_grads": Refused(_LOW_PRECISION),
    "bf16.bf16_optimizer_states": Refused(_LOW_PRECISION),
    "fp16": Refused("neither is its loss scaling", "use bf16, or neither for fp32"),
    "torch_autocast": Refused("its casts differ from those of the model", "use bf16, or neither for fp32"),
    "seq_parallel_communication_data_type": Refused("there is no sequence parallelism"),
    "sequence_parallel_size": Refused("there is no sequence parallelism", off=(1,)),
    "prescale_gradients": Refused(_GRADIENT),
    "gradient_predivide_factor": Refused(_GRADIENT, off=(1,)),
    "gradient_allreduce_op": Refused(_GRADIENT, off=("mean",)),
    "managed_gradient_accumulation": Refused("train.accumulation relies on it", off=(True,)),
    "disable_allgather": Refused("has no effect in this version"),
    "disable_python_gc": Refused("memory of reference cycles would never be freed"),
    "data_types.param_dtype": Refused(_TYPES),
    "data_types.buffer_dtype": Refused(_TYPES),
    "data_types.keep_in_fp32_modules": Refused(_TYPES, off=("auto",)),
    "activation_checkpointing": Refused("has no effect on this model", "set parallel.recompute"),
    "compile": Refused("DeepCompile is not supported", "set train.compile"),
    "pipeline": Refused("there is no pipeline parallelism"),
    "hybrid_engine": Refused("is for inference"),
    "weight_quantization": Refused("is for inference"),
    "autotuning": Refused("restarts the program", "use `megapromoe plan`"),
    "wandb": Refused(_ITS_OWN_METRICS),
    "comet": Refused(_ITS_OWN_METRICS),
    "log_level": Refused("DeepSpeed's messages are limited to warnings"),
    "data_efficiency": Refused(_ITS_OWN_DATA, "use the options of `data`"),
    "dataloader_drop_last": Refused(_ITS_OWN_DATA),
    "vocabulary_size": Refused("the model has no vocabulary"),
    "checkpoint": Refused(_ITS_OWN_CHECKPOINT),
    "datastates_ckpt": Refused(_ITS_OWN_CHECKPOINT),
    "use_data_before_expert_parallelism": Refused("the order of ranks is that of the mesh"),
    "aio": Refused(_NVME),
    "flops_profiler.recompute_fwd_factor": Refused("is for DeepSpeed's own recomputation"),
    "comms_logger.prof_ops": Refused("takes names of DeepSpeed's wrappers", "set prof_all"),
    f"{ZERO}.offload_param": Refused("parameters cannot be offloaded", "use stage 2 with offload_optimizer"),
    f"{ZERO}.cpu_offload": Refused("is the old spelling", "write 'offload_optimizer': {'device': 'cpu'}"),
    f"{ZERO}.cpu_offload_param": Refused("parameters cannot be offloaded"),
    f"{ZERO}.cpu_offload_use_pin_memory": Refused("is the old spelling", "set pin_memory in offload_optimizer"),
    f"{ZERO}.compute_grad_norm": Refused("clipping needs the norm", off=(True,)),
    f"{ZERO}.load_from_fp32_weights": Refused(_ITS_OWN_CHECKPOINT, off=(True,)),
    f"{ZERO}.elastic_checkpoint": Refused(_ITS_OWN_CHECKPOINT),
    f"{ZERO}.pipeline_loading_checkpoint": Refused(_ITS_OWN_CHECKPOINT),
    f"{ZERO}.stage3_gather_16bit_weights_on_model_save": Refused(_ITS_OWN_CHECKPOINT),
    f"{ZERO}.stage3_gather_fp16_weights_on_model_save": Refused(_ITS_OWN_CHECKPOINT),
    f"{ZERO}.gather_16bit_weights_on_model_save": Refused(_ITS_OWN_CHECKPOINT),
    f"{ZERO}.save_muon_momentum_buffer_in_memory": Refused("is for another optimizer"),
    f"{ZERO}.legacy_stage1": Refused("DeepSpeed 0.19.8 raises an error"),
    f"{ZERO}.zenflow": Refused("its update differs from AdamW's"),
    f"{ZERO}.zero_hpz_partition_size": Refused(
        "its second partition of the parameters does not support experts", off=(0, 1)
    ),
    f"{ZERO}.zero_quantized_weights": Refused(_QUANTIZED),
    f"{ZERO}.zero_quantized_nontrainable_weights": Refused(_QUANTIZED),
    f"{ZERO}.zero_quantized_gradients": Refused(_QUANTIZED),
    f"{ZERO}.stage3_module_granularity_threshold": Refused("leaf modules are not supported", off=(0,)),
    f"{ZERO}.leaf_module": Refused("leaf modules are not supported"),
    f"{OFFLOAD}.nvme_path": Refused(_NVME),
    f"{OFFLOAD}.buffer_count": Refused(_NVME),
    f"{OFFLOAD}.pipeline_read": Refused(_NVME),
    f"{OFFLOAD}.pipeline_write": Refused(_NVME),
    f"{OFFLOAD}.fast_init": Refused(_NVME),
    f"{OFFLOAD}.ratio": Refused("partial offload needs stage 3, where offload is not supported", off=(1,)),
    f"{OFFLOAD}.super_offload": Refused("needs stage 3, where offload is not supported"),
    f"{OFFLOAD}.cpuadam_cores_perc": Refused("needs super_offload"),
}
REFUSED |= {  # DeepSpeed takes these names too, but the planner does not
    f"{ZERO}.{name}": Refused("is the short spelling", f"write 'stage3_{name}'")
    for name in (
        *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold"),
        *("max_live_parameters", "max_reuse_distance", "module_granularity_threshold"),
        *("use_all_reduce_for_fetch_params", "allgather_sequential"),
    )
}
REFUSED |= {
    key: Refused(_REMOVED, always=True)
    for key in (
        *("nebula", "compression_training", "amp", "quantize_training", "sparse_gradients", "eigenvalue"),
        *("sparse_attention", "elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"),
        *(f"{ZERO}.mics_shard_size", f"{ZERO}.mics_hierarchical_params_gather", f"{ZERO}.zeropp_loco_param"),
    )
}


def has_no_effect(key: str, value: Any) -> bool:
    """Whether a refused key has no effect with this value.

    That is the case for null, for a value in `Refused.off`, and for a block that is not enabled, names no device, or
    whose values are all off.
    """
    refused = REFUSED[key]
    if refused.always:
        return False
    if isinstance(value, Mapping):
        disabled = value.get("enabled") is False or value.get("device") == "none"
        return disabled or all(inner is False or inner is None for inner in value.values())
    number = type(value) in (int, float)
    return value is None or any(value == off and (type(value) is type(off) or number) for off in refused.off)


def names_in(block: str) -> list[str]:
    """The names of all keys of a block, "" for the top of the file, for suggestions; supported ones come first."""
    prefix = f"{block}." if block else ""
    known = [*SUPPORTED, *OURS, *REFUSED]
    return [key.removeprefix(prefix) for key in known if key.startswith(prefix) and "." not in key[len(prefix) :]]
