"""What the engine needs of the library that shards it: partitions of the optimizer, and the few calls of a step.

`deepspeed_adapter.py` implements `ShardedBackend` by DeepSpeed. The rest of the package sees partitions alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megapromoe.errors import ExitCode, UserError
from megapromoe.nn.dit import DiT


class EngineError(UserError):
    """This machine, or what is installed on it, cannot train what the configuration asks for."""

    exit_code = ExitCode.MISCONFIGURED


class Piece(NamedTuple):
    """Elements [start, stop) of this rank's flattened parameter `name`, at [offset, ...) of a partition."""

    name: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Partition:
    """A flat fp32 tensor that this rank's optimizer updates, and which parameters lie where in it.

    Args:
        master: the fp32 weights, (elements,). At ZeRO stage 0 a view of a parameter.
        pieces: parts of parameters in `master`, by ascending offset; what lies between and after them is padding.
        optimized: the tensor that the optimizer holds, by which its state is keyed: `master` or what it is a view of.
    """

    master: Tensor
    pieces: tuple[Piece, ...]
    optimized: Tensor


class ShardedBackend(Protocol):
    """A model whose gradients, optimizer states and (stage 3) parameters are sharded over the data-parallel ranks.

    Attributes:
        optimizer: AdamW over the `optimized` tensors of all partitions.
        partitions: this rank's part of the weights.
        reported_norm: the gradient norm to clip by in `step`, where the backend clips; -1: skip the update.
    """

    optimizer: torch.optim.Optimizer
    partitions: tuple[Partition, ...]
    reported_norm: Tensor

    @property
    def device(self) -> torch.device:
        """Where the model computes."""

    @property
    def module(self) -> DiT:
        """The model; at stage 3 its parameters are empty outside of its own forward and backward."""

    def forward(self, *inputs: Any) -> Any:
        """What the model returns for `inputs`."""

    def backward(self, loss: Tensor) -> None:
        """Adds up gradients, averaged over data-parallel ranks and micro-steps, and reduces them in the last one."""

    def step(self) -> None:
        """Ends a micro-step; the last one of an update also clips, and runs the optimizer."""

    def gradients(self, partition: int) -> list[Tensor]:
        """The averaged gradients of a partition's pieces after the last micro-step.

        Returns:
            a flat tensor for each piece, of its elements or, if the piece ends in padding, more.
        """

    def sync_parameters_from_masters(self) -> None:
        """Copies changed masters to the parameters that the model computes with. Collective."""

    def close(self) -> None:
        """Frees hooks and buffers."""
