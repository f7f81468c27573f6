"""Dispatch with a fixed number of slots for each expert: all tensor shapes are known before the step.

Each rank has `tokens_per_expert` slots for the rows of each expert. Rows beyond them are dropped, so that their tokens
keep only the output of the shared experts; unused slots are sent as zeros. In return no row counts are exchanged or
copied to the host: a layer needs two collectives of equal parts forward and two backward, which a CUDA graph can
capture.

Which rows are dropped depends on the rows of each rank, so the result of training depends on the layout.

Source: GShard, arXiv 2006.16668, and Switch Transformer, arXiv 2101.03961, "expert capacity".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megapromoe.config.expert_placement import ExpertPlacement
from megapromoe.distributed.collectives import AsyncAllToAll
from megapromoe.distributed.mesh import Group
from megapromoe.nn.moe.assignment import rows_per_expert
from megapromoe.nn.moe.dispatcher import Dispatcher, Experts
from megapromoe.nn.moe.expert_linear import ExpertOffsets
from megapromoe.nn.tensor_parallel import NO_TENSOR_PARALLEL, Region


class CapacityDispatcher(Dispatcher):
    """Runs rows through experts of an ep group of one or more ranks, with a fixed number of rows from each rank."""

    def __init__(
        self,
        num_experts: int,
        group: Group,
        capacity_factor: float,
        region: Region = NO_TENSOR_PARALLEL,
        expert_tp: bool = False,
    ) -> None:
        """Makes the dispatcher of one MoE layer.

        Args:
            num_experts: routed experts E of the whole model.
            group: the ep group.
            capacity_factor: slots of an expert over its even share of the rows. At 1 no row is dropped only if all
                experts get equally many.
            region: see `Dispatcher`.
            expert_tp: see `Dispatcher`.
        """
        super().__init__(num_experts, region, expert_tp)
        self.group, self.num_experts, self.capacity_factor = group, num_experts, capacity_factor
        self.place_experts(ExpertPlacement.contiguous(num_experts, group.size))

    def tokens_per_expert(self, max_rows: int) -> int:
        """Slots for the rows of one rank for one expert: capacity_factor·max_rows/E, rounded up, at least 1.

        `max_rows`: the largest number of rows of any rank.
        """
        return max(1, math.ceil(self.capacity_factor * max_rows / self.num_experts))

    def arrange_rows(self, rows_RD: Tensor, expert_slot_R: Tensor, max_rows: int) -> _SlotsToSend:
        ep, experts_per_rank, Q = self.ep, self.slots_per_rank, self.tokens_per_expert(max_rows)
        num_slots = ep * experts_per_rank * Q
        count_E = rows_per_expert(expert_slot_R, ep * experts_per_rank)
        first_E = count_E.cumsum(0) - count_E
        # Rows are sorted by expert: the rank of a row is its number among the rows of its expert.
        rank_R = torch.arange(expert_slot_R.shape[0], device=rows_RD.device) - first_E[expert_slot_R]
        # All dropped rows get the same extra slot at the end, which is not sent.
        slot_R = torch.where(rank_R < Q, expert_slot_R * Q + rank_R, num_slots)
        dropped = (rank_R >= Q).float().sum() / max(expert_slot_R.shape[0], 1)
        slots = _ScatterToSlots.apply(rows_RD, slot_R, num_slots)
        return _SlotsToSend(slots, slot_R, dropped, self.group, experts_per_rank, Q)


class _SlotsToSend(NamedTuple):
    """Rows in slots."""

    slots: Tensor
    """(ep · experts_per_rank · tokens_per_expert, D)."""
    slot_R: Tensor
    """The slot of each row."""
    dropped: Tensor
    """Share of the rows without a slot, scalar."""
    group: Group
    experts_per_rank: int
    tokens_per_expert: int
    """Slots for the rows of one rank for one expert."""

    def send(self) -> _SentSlots:
        """Starts to send the slots."""
        ep, experts_per_rank, Q = self.group.size, self.experts_per_rank, self.tokens_per_expert
        equal_parts = [experts_per_rank * Q] * ep
        all_to_all = AsyncAllToAll(self.group, (equal_parts, equal_parts))
        return _SentSlots(all_to_all, all_to_all.start(self.slots), self.slot_R, experts_per_rank, Q)


class _SentSlots(NamedTuple):
    """The same slots on their way to the ranks of their experts."""

    dispatch_all_to_all: AsyncAllToAll
    slots: Tensor
    slot_R: Tensor
    experts_per_rank: int
    tokens_per_expert: int

    def run_experts(self, experts: Experts) -> _SentOutputs:
        return self.send_back(self.receive().outputs(experts))

    def receive(self) -> _ReceivedSlots:
        """Waits for the slots of other ranks."""
        ep, slots = self.dispatch_all_to_all.group.size, self.dispatch_all_to_all.wait(self.slots)
        return _ReceivedSlots(slots, ep, self.experts_per_rank, self.tokens_per_expert)

    def send_back(self, y: Tensor) -> _SentOutputs:
        """Starts to send the outputs of the received slots to the ranks of their tokens."""
        combine_all_to_all = AsyncAllToAll(self.dispatch_all_to_all.group, self.dispatch_all_to_all.sizes)
        return _SentOutputs(combine_all_to_all, combine_all_to_all.start(y), self.slot_R)


class _ReceivedSlots(NamedTuple):
    """Slots of all ranks for the experts of this rank."""

    slots: Tensor
    """(source rank · expert · slot, D)."""
    ep: int
    experts_per_rank: int
    tokens_per_expert: int

    def outputs(self, experts: Experts) -> Tensor:
        """The outputs of the experts in the order of the slots."""
        ep, num_experts, Q = self.ep, self.experts_per_rank, self.tokens_per_expert
        D = self.slots.shape[1]
        # (source rank, expert, slot) -> (expert, source rank, slot), and back.
        by_expert = self.slots.view(ep, num_experts, Q, D).transpose(0, 1).reshape(-1, D)
        expert_E = torch.arange(num_experts, device=self.slots.device)
        end_E = ((expert_E + 1) * ep * Q).to(torch.int32)
        host_end_E = [(expert + 1) * ep * Q for expert in range(num_experts)]
        y = experts(by_expert, ExpertOffsets(expert_E.repeat_interleave(ep * Q), end_E, host_end_E))
        return y.view(num_experts, ep, Q, D).transpose(0, 1).reshape(-1, D)


class _SentOutputs(NamedTuple):
    """The same slots with the experts' outputs, on their way back."""

    combine_all_to_all: AsyncAllToAll
    slots: Tensor
    slot_R: Tensor

    def combine_rows(self) -> Tensor:
        return self.wait().combine_rows()

    def wait(self) -> _ReturnedSlots:
        """Waits for the outputs of this rank's rows."""
        return _ReturnedSlots(self.combine_all_to_all.wait(self.slots), self.slot_R)


class _ReturnedSlots(NamedTuple):
    """The same slots with the experts' outputs."""

    slots: Tensor
    slot_R: Tensor

    def combine_rows(self) -> Tensor:
        return _GatherFromSlots.apply(self.slots, self.slot_R)


# Each function is the backward of the other. Autograd's backward would copy all slots to append the one that is not
# sent.


class _ScatterToSlots(torch.autograd.Function):
    """Rows (R, D) in their slots (num_slots, D). Rows of slot `num_slots` are dropped, empty slots are zero."""

    @staticmethod
    def forward(ctx, rows_RD, slot_R, num_slots):
        ctx.save_for_backward(slot_R)
        return _scatter(rows_RD, slot_R, num_slots)

    @staticmethod
    def backward(ctx, grad):
        return _gather(grad, *ctx.saved_tensors), None, None


class _GatherFromSlots(torch.autograd.Function):
    """The rows (R, D) in the given slots, zero for dropped rows."""

    @staticmethod
    def forward(ctx, slots, slot_R):
        ctx.save_for_backward(slot_R)
        ctx.num_slots = slots.shape[0]
        return _gather(slots, slot_R)

    @staticmethod
    def backward(ctx, grad_RD):
        return _scatter(grad_RD, *ctx.saved_tensors, ctx.num_slots), None


def _scatter(rows_RD: Tensor, slot_R: Tensor, num_slots: int) -> Tensor:
    return rows_RD.new_zeros(num_slots + 1, rows_RD.shape[1]).index_copy_(0, slot_R, rows_RD)[:-1]


def _gather(slots: Tensor, slot_R: Tensor) -> Tensor:
    num_slots = slots.shape[0]
    rows_RD = slots.index_select(0, slot_R.clamp(max=num_slots - 1))
    rows_RD.masked_fill_((slot_R == num_slots).unsqueeze(1), 0)
    # A view: torch.compile of torch 2.11 loses the gradient of a tensor that an autograd.Function changed in place and
    # returned (pytorch issue 180642).
    return rows_RD.view_as(rows_RD)
