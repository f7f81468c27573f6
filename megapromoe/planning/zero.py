"""The values of a DeepSpeed file that determine memory, traffic and time, with DeepSpeed's defaults.

Source: deepspeed/runtime/zero/config.py, 0.19.8.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megapromoe.config.deepspeed_file import load_deepspeed
from megapromoe.config.options import Config
from megapromoe.config.train_options import TrainConfig

LARGEST_EXPERT_GROUP = 178_956_971


@dataclass(frozen=True)
class Zero:
    """ZeRO's settings; sizes are numbers of elements.

    Args:
        stage: 0 to 3.
        width: bytes b of an activation, parameter or gradient: 2 for bf16, else 4.
        message_width: bytes of a gradient in a message at stages 1 and 2.
        bucket: size of a gradient bucket. `contiguous`: gradients are copied to a buffer first; `overlap`: buckets are
            reduced during the backward pass, with two buffers at stages 1 and 2.
        small: stage 3 keeps parameters up to this size gathered.
        reuse: stage 3 keeps parameters that are needed again within this many elements, and prefetches `ahead`
            elements.
        offload: whether the optimizer is in host memory.
    """

    stage: int
    width: int
    message_width: int
    bucket: int
    contiguous: bool
    overlap: bool
    small: int
    reuse: int
    ahead: int
    offload: bool

    @property
    def kept(self) -> int:
        """Elements of the last layers' large parameters that stage 3 keeps from the forward to the backward pass."""
        return max(self.ahead, self.reuse) // 2  # the distance counts both passes


def scatters_gradients(config: Config) -> bool:
    """Whether each rank gets the sum of its shard of the gradients alone, in place of DeepSpeed's all-reduce.

    With Muon only if `train.gradient_reduction` says so: small parameter groups divide more matrices over ranks, and
    exchanging these costs what the reduce-scatter saves. Raises ConfigError if the file is wrong.
    """
    zero, choice = zero_of(config), config.train.gradient_reduction
    if zero.stage not in (1, 2) or zero.offload:
        return False
    return choice == "reduce_scatter" or (choice == "auto" and config.train.optimizer != "muon")


def largest_group(config: Config, routed: bool, ranks: int) -> float:
    """Elements that a parameter group of the optimizer has at most, unless it is a single larger parameter.

    A group is the unit of the reduction over `ranks`, so it is a bucket. Without reduce-scatter only those of
    routed experts are limited, as DeepSpeed does (0.19.8, deepspeed/moe/utils.py, max_group_size).
    """
    if ranks > 1 and scatters_gradients(config):
        return zero_of(config).bucket
    return LARGEST_EXPERT_GROUP if routed else math.inf


def consecutive_groups(sizes: Sequence[int], largest: float) -> list[range]:
    """Divides consecutive tensors of these sizes into groups of at most `largest` elements, by their indices."""
    groups: list[range] = []
    start, elements = 0, 0
    for number, size in enumerate(sizes):
        if number > start and elements + size > largest:
            groups.append(range(start, number))
            start, elements = number, 0
        elements += size
    return [*groups, range(start, len(sizes))] if sizes else groups


def zero_of(config: Config) -> Zero:
    """The settings in the file that `train.deepspeed` names. Raises ConfigError if the file is wrong."""
    return _read(config.train.deepspeed)


@lru_cache(maxsize=64)
def _read(name: str) -> Zero:
    content = load_deepspeed(Config(train=TrainConfig(deepspeed=name)))
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    width = 2 if content.get("bf16", {}).get("enabled", False) else 4
    return Zero(
        stage=stage,
        width=width,
        message_width={"fp32": 4, "bf16": 2}.get(content.get("communication_data_type") or "", width),
        bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        contiguous=zero.get("contiguous_gradients", True),
        overlap=bool(stage) and zero.get("overlap_comm", stage == 3),
        small=int(zero.get("stage3_param_persistence_threshold", 100_000)),
        reuse=int(zero.get("stage3_max_reuse_distance", 1_000_000_000)),
        ahead=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
        offload=zero.get("offload_optimizer", {}).get("device", "none") != "none",
    )
