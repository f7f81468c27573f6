"""The values of a DeepSpeed file that determine memory, traffic and time, with DeepSpeed's defaults.

Source: deepspeed/runtime/zero/config.py, 0.19.8.
"""

from dataclasses import dataclass
from functools import lru_cache

from megapromoe.config.deepspeed_file import load_deepspeed
from megapromoe.config.options import Config, TrainConfig


@dataclass(frozen=True)
class Zero:
    """ZeRO's settings; sizes are numbers of elements.

    Args:
        stage: 0 to 3.
        width: bytes b of an activation, parameter or gradient: 2 for bf16, else 4.
        bucket: size of a gradient bucket. `contiguous`: gradients are copied to a buffer first; `overlap`: buckets are
            reduced during the backward pass, with two buffers at stages 1 and 2.
        small: stage 3 keeps parameters up to this size gathered.
        reuse: stage 3 keeps parameters that are needed again within this many elements, and prefetches `ahead`
            elements.
        offload: whether the optimizer is in host memory.
    """

    stage: int
    width: int
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


def zero_of(config: Config) -> Zero:
    """The settings in the file that `train.deepspeed` names. Raises ConfigError if the file is wrong."""
    return _read(config.train.deepspeed)


@lru_cache(maxsize=64)
def _read(name: str) -> Zero:
    content = load_deepspeed(Config(train=TrainConfig(deepspeed=name)))
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    return Zero(
        stage=stage,
        width=2 if content.get("bf16", {}).get("enabled", False) else 4,
        bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        contiguous=zero.get("contiguous_gradients", True),
        overlap=bool(stage) and zero.get("overlap_comm", stage == 3),
        small=int(zero.get("stage3_param_persistence_threshold", 100_000)),
        reuse=int(zero.get("stage3_max_reuse_distance", 1_000_000_000)),
        ahead=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
        offload=zero.get("offload_optimizer", {}).get("device", "none") != "none",
    )
