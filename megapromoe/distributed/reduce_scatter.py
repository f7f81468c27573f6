"""A reduce-scatter in two calls, between which other work is enqueued."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed this function and warns about the old name.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class AsyncReduceScatter:
    """Sums a tensor over a group; each rank gets one of the equal parts of the sum. Starts when it is made.

    NCCL's reduce-scatter does this on a GPU. That of gloo (torch 2.11 to 2.14) all-reduces the whole tensor and drops
    all other parts, which is twice the bytes. So CPU tensors are exchanged by an all-to-all, and each rank adds up its
    part in float32, in the order of the ranks. A rank sends (ranks - 1) / ranks of the tensor either way.
    """

    def __init__(self, packed: Tensor, process_group: dist.ProcessGroup | None):
        """Starts the sum of `packed`. Collective.

        Args:
            packed: (ranks * part,), first the part of rank 0. It must not change until `wait` has returned; in a group
                of one rank it is the result.
            process_group: the ranks.
        """
        self._packed, self._ranks = packed, dist.get_world_size(process_group)
        self._work: dist.Work | None = None
        if self._ranks == 1:
            return
        if packed.device.type == "cpu":
            self._received = torch.empty_like(packed)
            self._work = dist.all_to_all_single(self._received, packed, group=process_group, async_op=True)
        else:
            self._received = packed.new_empty(packed.numel() // self._ranks)
            self._work = _reduce_scatter(self._received, packed, group=process_group, async_op=True)

    def wait(self) -> Tensor:
        """This rank's part of the sum, (part,), of the type of the input. On a GPU only the current stream waits."""
        if self._work is None:
            return self._packed
        self._work.wait()
        if self._packed.device.type == "cpu":
            return self._received.view(self._ranks, -1).sum(0, dtype=torch.float32).to(self._packed.dtype)
        return self._received
