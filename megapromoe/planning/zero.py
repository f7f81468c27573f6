"""What a DeepSpeed file says that memory, traffic and time depend on, with DeepSpeed's defaults.

Source: deepspeed/runtime/zero/config.py, 0.19.8.
"""

from dataclasses import dataclass
from functools import lru_cache

from megapromoe.config.deepspeed_file import load_deepspeed
from megapromoe.config.options import Config, TrainConfig


@dataclass(frozen=True)
class Zero:
    """ZeRO's knobs; sizes in elements.

    Args:
        stage: 0 to 3.
        width: bytes b of an activation, a parameter and a gradient: 2 in bf16, else 4.
        bucket: gradients that are reduced together. `contiguous`: they are copied into a buffer first;
            `overlap`: beside the backward pass, with two such buffers at stages 1 and 2.
        small: stage 3 never lets go of parameters up to this size.
        reuse: it keeps what is needed again within so many elements, and looks `ahead` so far.
        offload: the optimizer lives in the host's memory.
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
        """Of stage 3's large parameters: those of the last layers stay from the forward to the backward pass."""
        return max(self.ahead, self.reuse) // 2  # there and back again


def zero_of(config: Config) -> Zero:
    """The knobs in the file that `train.deepspeed` names; raises ConfigError where it is wrong."""
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
