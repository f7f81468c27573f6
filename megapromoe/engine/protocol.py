"""The interface of the library that shards the model: the partitions of the optimizer and the calls of a step.

`deepspeed_backend/` implements `ShardedBackend` with DeepSpeed. The rest of the package uses partitions only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megapromoe.errors import ExitCode, UserError
from megapromoe.nn.dit import DiT


class EngineError(UserError):
    """The configuration cannot be trained on this machine or with the installed packages."""

    exit_code = ExitCode.MISCONFIGURED


class Piece(NamedTuple):
    """Elements [start, stop) of this rank's flattened parameter `name`, which begin at `offset` in a partition."""

    name: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Partition:
    """A flat fp32 tensor that this rank's optimizer updates, and the parameters that it consists of.

    Args:
        master: the fp32 weights, (elements,). At ZeRO stage 0 a view of a parameter.
        pieces: parts of parameters in `master`, by ascending offset; elements between and after them are padding.
        optimized: the key of the optimizer's state: `master`, or the parameter that it is a view of.
        uses_muon: whether it consists of hidden matrices that Muon updates; AdamW updates all others.
    """

    master: Tensor
    pieces: tuple[Piece, ...]
    optimized: Tensor
    uses_muon: bool = False


@dataclass(frozen=True)
class PartitionShards:
    """The partitions with the same number on all ranks of a group, which are the parts of the same parameters.

    Attributes:
        process_group: the ranks; None: this rank alone has all elements.
        rank: this rank's number in the group.
        pieces: for each rank of the group the pieces of its partition.
    """

    process_group: dist.ProcessGroup | None
    rank: int
    pieces: tuple[tuple[Piece, ...], ...]


PartitionUpdate = Callable[[int, Tensor, Tensor], None]
"""(number of a partition, its gradient, the parameters of the model that are cast from its master), all flat.

The gradient is averaged but not clipped. It ends with the last piece, or has all elements of the partition.
"""


class Averages(Protocol):
    """Averages of the weights that an engine updates in its step.

    Attributes:
        averages: for each of them a flat fp32 tensor for each partition of the engine.
    """

    averages: list[list[Tensor]]

    def weights(self, applied: Tensor) -> list[Tensor]:
        """How far each average moves towards the new weights, () float32; counts the update if it is `applied`."""


class ShardedBackend(Protocol):
    """A model whose gradients, optimizer states and (stage 3) parameters are sharded over the data-parallel ranks.

    Attributes:
        optimizer: AdamW, or AdamW and Muon, over the `optimized` tensors of all partitions.
        partitions: this rank's part of the weights.
        reported_norm: the gradient norm to clip by in `step`, where the backend clips; -1: skip the update.
    """

    optimizer: torch.optim.Optimizer
    partitions: tuple[Partition, ...]
    reported_norm: Tensor

    @property
    def device(self) -> torch.device:
        """The device of the model."""

    @property
    def module(self) -> DiT:
        """The model; at stage 3 its parameters are empty outside of its forward and backward."""

    def forward(self, *inputs: Any) -> Any:
        """Runs the model on `inputs` and returns its result."""

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients, averaged over data-parallel ranks and micro-steps; reduces them in the last one."""

    def step(self) -> None:
        """Ends a micro-step; after the last one of an update also clips and runs the optimizer."""

    def step_by_partitions(self, update: PartitionUpdate) -> None:
        """Ends an update whose arithmetic is `update`; collective. Called for partitions with pieces, and all of Muon.

        Only with `train.adamw_backend=fused`, in place of `step`.
        """

    def parameter_group(self, partition: int) -> dict[str, Any]:
        """The group of the optimizer that has a partition, with "betas", "eps" and "weight_decay"."""

    def shards(self, partition: int) -> PartitionShards:
        """The partitions with this number on all ranks that share its parameters."""

    def gradients(self, partition: int) -> list[Tensor]:
        """The averaged gradients of a partition's pieces after the last micro-step.

        Returns:
            a flat tensor for each piece; it has more elements than the piece if padding follows.
        """

    def sync_parameters_from_masters(self) -> None:
        """Copies changed masters into the parameters of the model. Collective."""

    def close(self) -> None:
        """Frees hooks and buffers."""
