"""Gradients at ZeRO stages 1 and 2 that are summed straight into the shard of each rank.

DeepSpeed 0.19.8 all-reduces buckets of gradients in the order in which they are complete, and copies a rank's shard
out of them (`average_tensor`). Its shards are consecutive parts of a parameter group, so such a bucket belongs to one
or two ranks, and no reduce-scatter with equal parts fits it. Here the parameter groups of the optimizer are the
buckets: `start.make_optimizer` makes them as small as buckets, and DeepSpeed divides each group equally over the ranks.
The gradients of a group, in the order of its flat parameters, are then what a reduce-scatter divides, without a copy.

Where states are divided over some of the data-parallel ranks alone, such as those of a node (`parallel.shard_ranks`),
the group of DeepSpeed's optimizer is these ranks. They are a reduce-scatter's ranks, and each shard is then all-reduced
over its replicas, the ranks of other nodes that have the same shard.

`GradientScatter` replaces three methods of DeepSpeed's optimizer, which its hooks and its engine call. Parameters,
masters, the step and the gather of the parameters remain DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megapromoe.distributed.mesh import Group
from megapromoe.distributed.reduce_scatter import AsyncReduceScatter
from megapromoe.engine.deepspeed_backend.internals import check_version
from megapromoe.engine.protocol import Partition

check_version(deepspeed.__version__)  # before the imports that other versions lack

from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup  # noqa: E402


class GradientScatter:
    """Replaces DeepSpeed's all-reduce of gradients by a reduce-scatter of each parameter group.

    A group is reduced as soon as all its gradients are complete, during the backward pass with `overlap_comm`. At most
    one reduction is under way in a process group, so that there are at most two buckets for it besides those that
    wait for a parameter which is used early in the forward pass. All ranks complete the groups in the same order,
    because they run the same backward pass. The all-reduce of a shard over its replicas starts when the reduce-scatter
    has ended, in the last micro-batch alone, and runs beside the next group's reduce-scatter.
    """

    def __init__(
        self,
        zero: Any,
        partitions: Sequence[Partition],
        replicas: Sequence[Group],
        data_ranks: int,
        device: torch.device,
    ):
        """Replaces the methods.

        Args:
            zero: the optimizer wrapper of DeepSpeed's engine at ZeRO stage 1 or 2, without offloading.
            replicas: of each partition, the ranks that have the same shard.
            data_ranks: number of data-parallel ranks, by which gradients are divided.
        """
        self._zero = zero
        self._buckets = [
            Bucket(zero, number, partition, group, data_ranks, device)
            for number, (partition, group) in enumerate(zip(partitions, replicas, strict=True))
        ]
        self._scattering: dict[dist.ProcessGroup, Bucket] = {}
        self._summing: dict[dist.ProcessGroup, Bucket] = {}
        zero.process_gradients = self._add
        zero.reduce_gradients = self._finish
        zero.overlapping_partition_gradients_reduce_epilogue = self._finish

    def _add(self, parameter: nn.Parameter, number: int) -> None:
        """Takes the gradient of a parameter. Called by DeepSpeed's hook when it is complete.

        Stage 1 sums micro-batches in `parameter.grad` and reduces in the last one, stage 2 reduces each.
        """
        zero = self._zero
        if not (zero.partition_gradients or zero.is_gradient_accumulation_boundary()):
            return
        bucket = self._buckets[number]
        bucket.add(parameter)
        if bucket.is_complete:
            self._reduce(bucket)

    def _reduce(self, bucket: Bucket) -> None:
        zero = self._zero
        self._finish_scatter(bucket.process_group)
        bucket.start_reduction()
        self._scattering[bucket.process_group] = bucket
        if not zero.overlap_comm:
            self._finish_all()

    def _finish_scatter(self, process_group: dist.ProcessGroup) -> None:
        """Ends the reduce-scatter over these ranks, if there is one, and starts the sum over replicas."""
        zero = self._zero
        bucket = self._scattering.pop(process_group, None)
        if bucket is None:
            return
        bucket.finish_reduction()
        replicas = bucket.replicas.process_group
        if bucket.replicas.size > 1 and replicas is not None and zero.is_gradient_accumulation_boundary():
            if replicas in self._summing:
                self._summing.pop(replicas).finish_sum()
            bucket.start_sum()
            self._summing[replicas] = bucket

    def _finish_all(self) -> None:
        for process_group in list(self._scattering):
            self._finish_scatter(process_group)
        for bucket in self._summing.values():
            bucket.finish_sum()
        self._summing.clear()

    def _finish(self, *_: Any, **__: Any) -> None:
        """Ends the backward pass of a micro-batch; called by DeepSpeed's engine, at stage 1 only in the last one.

        Parameters without a gradient count as zero, as in DeepSpeed; they must be the same ones on all ranks.
        """
        zero = self._zero
        for bucket in self._buckets:
            if bucket.awaits_gradients:
                bucket.fill_with_zeros()
                self._reduce(bucket)
        self._finish_all()
        for number, bucket in enumerate(self._buckets):
            if zero.is_gradient_accumulation_boundary():
                zero.averaged_gradients[number] = bucket.take_shard()
            else:
                bucket.keep_shard()


class Bucket:
    """The gradients of one parameter group, in the order of DeepSpeed's flat parameters.

    Attributes:
        process_group: the ranks over which the group is divided.
        replicas: the ranks that have the same shard.
    """

    def __init__(
        self, zero: Any, number: int, partition: Partition, replicas: Group, data_ranks: int, device: torch.device
    ):
        self.process_group: dist.ProcessGroup = zero.real_dp_process_group[number]
        self.replicas = replicas
        # Experts too are divided by the data-parallel size, because each of their ranks has rows of other ranks.
        self._divisor = data_ranks
        self._device = device
        self._bucket_dtype: torch.dtype = zero.communication_data_type
        self._shard_dtype: torch.dtype = zero.gradient_accumulation_dtype
        self._size: int = int(zero.partition_size[number]) * dist.get_world_size(self.process_group)
        parameters, offsets = zero.round_robin_bit16_groups[number], zero.round_robin_bit16_offsets[number]
        self._ranges = {
            id(parameter): (offset, offset + parameter.numel())
            for parameter, offset in zip(parameters, offsets, strict=True)
        }
        self._pieces = partition.pieces
        self._missing = dict(self._ranges)
        self._packed: Tensor | None = None
        self._reduction: AsyncReduceScatter | None = None
        self._shard: Tensor | None = None
        self._message: Tensor | None = None
        self._sum: dist.Work | None = None
        self._reduced = False
        self._streams: set[torch.cuda.Stream] = set()

    @property
    def is_complete(self) -> bool:
        """Whether all gradients have been added."""
        return not self._missing

    @property
    def awaits_gradients(self) -> bool:
        """Whether the group has not been reduced in this backward pass."""
        return not self._reduced

    def add(self, parameter: nn.Parameter) -> None:
        """Moves the gradient of a parameter into the bucket, divided by the data-parallel size."""
        start, stop = self._missing.pop(id(parameter))
        packed = self._allocated()
        gradient = parameter.grad
        assert gradient is not None
        torch.div(gradient, self._divisor, out=packed[start:stop].view(gradient.shape))
        parameter.grad = None

    def fill_with_zeros(self) -> None:
        """Completes the bucket with zeros."""
        packed = self._allocated()
        for start, stop in self._missing.values():
            packed[start:stop].zero_()
        self._missing.clear()

    def start_reduction(self) -> None:
        """Starts the reduce-scatter. Collective."""
        assert self._packed is not None and self.is_complete
        for stream in self._streams:  # compiled hooks may run on streams of their own
            torch.cuda.current_stream(self._device).wait_stream(stream)
        self._streams.clear()
        self._reduction, self._packed = AsyncReduceScatter(self._packed, self.process_group), None
        self._reduced = True

    def finish_reduction(self) -> None:
        """Adds the result to the shard, which has the sum over the micro-batches."""
        assert self._reduction is not None
        reduced, self._reduction = self._reduction.wait().to(self._shard_dtype), None
        self._shard = reduced if self._shard is None else self._shard.add_(reduced)

    def start_sum(self) -> None:
        """Starts the all-reduce of the shard over its replicas. Collective."""
        assert self._shard is not None
        self._message = self._shard.to(self._bucket_dtype)
        self._sum = dist.all_reduce(self._message, group=self.replicas.process_group, async_op=True)

    def finish_sum(self) -> None:
        """Sets the shard to the sum over its replicas."""
        assert self._sum is not None and self._message is not None
        self._sum.wait()
        self._shard = self._message.to(self._shard_dtype)
        self._sum = self._message = None

    def keep_shard(self) -> None:
        """Prepares for the next micro-batch, whose gradients are added."""
        self._missing, self._reduced = dict(self._ranges), False

    def take_shard(self) -> GradPartitionBufferGroup:
        """The averaged gradient of this rank's partition as DeepSpeed keeps it, and prepares for the next update.

        A list of flat parts of one tensor: the partition's pieces, and marked padding between and after them.
        """
        assert self._shard is not None
        shard, self._shard = self._shard, None
        self.keep_shard()
        return GradPartitionBufferGroup(list(self._parts(shard)), shard)

    def _parts(self, shard: Tensor) -> Iterator[Tensor]:
        position = 0
        for piece in self._pieces:
            if piece.offset > position:
                yield _padding(shard[position : piece.offset])
            position = piece.offset + piece.stop - piece.start
            yield shard[piece.offset : position]
        if position < shard.numel():
            yield _padding(shard[position:])

    def _allocated(self) -> Tensor:
        """The bucket (ranks * part,), with zeros in its padding."""
        if self._device.type == "cuda":
            self._streams.add(torch.cuda.current_stream(self._device))
        if self._packed is None:
            self._packed = torch.empty(self._size, dtype=self._bucket_dtype, device=self._device)
            position = 0
            for start, stop in self._ranges.values():
                if start > position:
                    self._packed[position:start].zero_()
                position = stop
            self._packed[position:].zero_()
        return self._packed


def _padding(part: Tensor) -> Tensor:
    part._zero_padding = True  # type: ignore[attr-defined]  # DeepSpeed's mark
    return part
