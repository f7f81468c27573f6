"""A step of ZeRO's optimizers in which this package updates each partition, instead of DeepSpeed's passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megapromoe.engine.deepspeed_backend.internals import check_version
from megapromoe.engine.protocol import Partition, PartitionUpdate

check_version(deepspeed.__version__)  # before the imports that other versions lack

from deepspeed.runtime.utils import all_gather_dp_groups  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID  # noqa: E402


class StepByPartitions:
    """Replaces the step of DeepSpeed's optimizer, which joins, casts, scales and copies in passes of their own.

    Attributes:
        update: called with each partition in the next step.
    """

    def __init__(self, stage: int, zero: Any, partitions: Sequence[Partition], device: torch.device, copies: bool):
        """Replaces the step.

        Args:
            zero: the optimizer wrapper of DeepSpeed's engine at ZeRO stage 1, 2 or 3.
            copies: DeepSpeed copies reduced gradients out of buckets: at stages 1 and 2, unless they are
                reduce-scattered.
        """
        self._zero, self._partitions, self._device = zero, partitions, device
        self.update: PartitionUpdate | None = None
        if stage == 3:
            zero.step = self._step_of_stage_3
        else:
            if copies:
                self._order_gradients()
            zero.step = self._step_of_stages_1_and_2

    def _order_gradients(self) -> None:
        """Makes reduced gradients lie in memory in the order of the partitions, so that nothing has to join them.

        0.19.8 copies those of this rank's partitions into one tensor for each micro-step, in the order in which they
        are reduced: each to the offset at which the one before it ended. This sets tensor and offset before each copy.
        """
        zero = self._zero
        offsets, total = {}, 0
        for parameters in zero.params_in_partition:
            for p in parameters:
                offsets[id(p)], total = total, total + p.numel()
        copy = zero.copy_grads_in_partition

        def copy_in_order(parameter: nn.Parameter, group: int | None = None) -> None:
            if zero.grads_in_partition is None:
                zero.grads_in_partition = torch.empty(total, dtype=zero.dtype, device=self._device)
            zero.grads_in_partition_offset = offsets[id(parameter)]
            copy(parameter, group)

        zero.copy_grads_in_partition = copy_in_order

    def _step_of_stages_1_and_2(self) -> None:
        """As `step` of 0.19.8 without offloading, with `update` in place of the optimizer and the passes around it."""
        assert self.update is not None, "DeepSpeed's optimizer made a step of its own"
        zero = self._zero
        zero.micro_step_id = INITIAL_MICRO_STEP_ID
        for number, partition in enumerate(self._partitions):
            # Tensors after the last piece are padding, and so are those that 0.19.8 puts between parameters.
            stop = max((p.offset + p.stop - p.start for p in partition.pieces), default=0)
            shard = zero.parallel_partitioned_bit16_groups[number][dist.get_rank(zero.real_dp_process_group[number])]
            if stop:
                self.update(number, joined(zero.averaged_gradients[number], stop), shard)
            elif partition.uses_muon:  # a rank with padding alone takes part in the exchange of matrices
                self.update(number, shard[:0], shard)
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
        assert self.update is not None, "DeepSpeed's optimizer made a step of its own"
        zero = self._zero
        zero._pre_step()
        zero._partition_all_parameters()
        zero.zero_grad(set_to_none=True)
        for number, partition in enumerate(self._partitions):
            gradient = joined(zero.averaged_gradients[number], partition.master.numel())
            self.update(number, gradient, zero.fp16_partitioned_groups_flat[number])
            zero.averaged_gradients[number] = None
            zero._unflatten_partitioned_parameters(number)
        zero._post_step(set())


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
