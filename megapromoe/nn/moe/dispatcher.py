"""Sends tokens to their experts and combines the experts' outputs.

A router assigns tokens to experts. Each pair of a token and one of its experts is a *row*. A layer makes three calls:

* `Dispatcher.dispatch` sorts the rows by expert and starts to send them to the ranks that hold the experts.
* `Dispatcher.run_experts` applies the experts and starts to send their outputs back.
* `Dispatcher.combine` multiplies each output by its routing weight and adds it to its token.

`Dispatcher` works on one rank, `ExpertParallelDispatcher` by uneven all-to-all, and `CapacityDispatcher` (in
`capacity_dispatcher.py`) by all-to-all of equal parts. Routing weights are not sent: the rank of the token applies
them.

The caller runs the shared and the unconditional experts between the calls. They overlap the copy of the row counts to
the host, the combine all-to-all and, in backward, both all-to-alls of gradients.

Each all-to-all sends D·b·(1 - 1/ep) bytes for each row, at b bytes an element, if rows are spread evenly over ranks. A
layer needs three collectives forward (row counts, dispatch, combine) and two backward.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megapromoe.distributed.collectives import AsyncAllToAll, exchange_counts
from megapromoe.distributed.host_copy import AsyncHostCopy
from megapromoe.distributed.mesh import Group
from megapromoe.distributed.parameter_layout import ExpertPlacement
from megapromoe.nn.moe.assignment import TokenAssignment, rows_per_expert
from megapromoe.nn.moe.expert_linear import ExpertOffsets, has_grouped_mm_kernel
from megapromoe.nn.moe.row_permutations import (
    AddToTokens,
    GatherTokens,
    Permute,
    add_to_tokens,
    inverse_permutation,
    sort_by_expert,
)
from megapromoe.nn.tensor_parallel import NO_TENSOR_PARALLEL, Region

Experts = Callable[[Tensor, ExpertOffsets], Tensor]
"""The experts of a rank: rows (R, D) sorted by expert, and the offsets of each expert -> outputs (R, D)."""


class DispatchedRows(Protocol):
    """Rows that are being sent to their experts."""

    @property
    def dropped(self) -> Tensor | None:
        """Share of this rank's rows that were dropped, a scalar; None for dispatchers that drop none."""

    def run_experts(self, experts: Experts) -> OutputRows:
        """Applies the experts and starts to send their outputs back."""


class OutputRows(Protocol):
    """Outputs of experts that are being sent back."""

    def combine_rows(self) -> Tensor:
        """The outputs (R, D), in the order in which the rows were dispatched."""


class DispatchMetadata(NamedTuple):
    """How the rows of a dispatch are sorted, which `combine` needs to put their outputs back."""

    assignment: TokenAssignment
    """The rows that this rank computes."""
    token_R: Tensor
    """The token of each row, rows sorted by expert."""
    order_R: Tensor
    """The permutation that sorts the rows of `assignment` by expert."""
    inverse_R: Tensor | None
    """The inverse of `order_R`; None for rows that are not token-major."""


class Dispatched(NamedTuple):
    """A dispatch whose experts have not run yet."""

    metadata: DispatchMetadata
    rows: DispatchedRows


class ExpertOutputs(NamedTuple):
    """A dispatch whose experts run."""

    metadata: DispatchMetadata
    rows: OutputRows
    dropped: Tensor | None
    """See `DispatchedRows.dropped`."""


class Dispatcher:
    """Runs rows through experts that are all on this rank.

    The host waits for the GPU only where experts are looped over (`expert_linear.has_grouped_mm_kernel`), once a layer.
    """

    def __init__(self, num_experts: int, region: Region = NO_TENSOR_PARALLEL, expert_tp: bool = False):
        """Makes the dispatcher of one MoE layer.

        Args:
            num_experts: routed experts E of the whole model.
            region: the tensor-parallel group, over whose ranks the rows are divided: each row is computed once.
            expert_tp: every rank of the region computes all rows instead, with its slice of each expert.
        """
        self.placement = ExpertPlacement(num_experts, 1)
        self.region = region
        self.expert_tp = expert_tp

    def dispatch(self, x_TD: Tensor, assignment: TokenAssignment, max_tokens: int) -> Dispatched:
        """Sorts the rows by expert and starts to send them.

        Args:
            x_TD: tokens (T, D), the same on every rank of the region.
            assignment: rows over these tokens.
            max_tokens: the largest T of any rank: the tokens of a whole micro-batch.
        """
        if self.expert_tp and self.region.is_sharded:
            assignment = assignment._replace(weight_R=self.region.copy_to_region(assignment.weight_R))
        else:
            assignment = assignment.shard(self.region, x_TD.shape[0])
        shards = 1 if self.expert_tp else self.region.size
        max_rows = -(-max_tokens // shards) * max(assignment.top_k, 1)
        slots = self.placement.ep * self.placement.slots
        expert_slot_R, order_R = sort_by_expert(self.placement.slot_of(assignment.expert_R), slots)
        token_R = assignment.tokens_of(order_R)
        if assignment.top_k:
            inverse_R = inverse_permutation(order_R)
            rows_RD = GatherTokens.apply(x_TD, assignment, token_R, inverse_R)
        else:
            rows_RD, inverse_R = x_TD.index_select(0, token_R), None
        metadata = DispatchMetadata(assignment, token_R, order_R, inverse_R)
        return Dispatched(metadata, self.dispatch_rows(rows_RD, expert_slot_R, max_rows))

    def run_experts(self, dispatched: Dispatched, experts: Experts) -> ExpertOutputs:
        """Applies the experts to their rows and starts to send the outputs back."""
        rows = dispatched.rows
        return ExpertOutputs(dispatched.metadata, rows.run_experts(experts), rows.dropped)

    def combine(self, outputs: ExpertOutputs, base_TD: Tensor) -> Tensor:
        """Adds each output, times its routing weight, to its token.

        Args:
            outputs: of `run_experts`.
            base_TD: the rest of the layer's output, (T or more, D), compiled (T, D); it is overwritten.

        Returns:
            base + Σ weight·expert(x) over the rows of this rank; in a sharded region a partial sum.
        """
        metadata = outputs.metadata
        y_RD, weight_R = outputs.rows.combine_rows(), metadata.assignment.weight_R
        if metadata.inverse_R is not None and torch.compiler.is_compiling() and not self.region.is_sharded:
            return add_to_tokens(base_TD, y_RD, metadata.assignment, metadata.order_R, metadata.inverse_R)
        if metadata.assignment.top_k:
            return AddToTokens.apply(base_TD, y_RD, weight_R, metadata)
        return base_TD.index_add(0, metadata.token_R, y_RD * weight_R[metadata.order_R].to(y_RD.dtype).unsqueeze(1))

    def dispatch_rows(self, rows_RD: Tensor, expert_slot_R: Tensor, max_rows: int) -> DispatchedRows:
        """Starts to send rows that are sorted by expert slot.

        Args:
            rows_RD: rows (R, D).
            expert_slot_R: the slot of each row's expert, see `ExpertPlacement`; int64 (R,).
            max_rows: the largest R of any rank.
        """
        end_E = end_offsets(expert_slot_R, self.placement.slots)
        on_device = has_grouped_mm_kernel(rows_RD) or torch.compiler.is_compiling()
        host_copy = None if on_device else AsyncHostCopy(end_E)
        return _LocalRows(rows_RD, expert_slot_R, end_E, host_copy)


class _LocalRows(NamedTuple):
    """Rows for experts on this rank; nothing is sent."""

    rows_RD: Tensor
    expert_slot_R: Tensor
    end_E: Tensor
    host_copy: AsyncHostCopy | None

    @property
    def dropped(self) -> None:
        return None

    def run_experts(self, experts: Experts) -> _LocalOutputs:
        return _LocalOutputs(self, experts)


class _LocalOutputs(NamedTuple):
    """Outputs of experts on this rank.

    The experts run in `combine_rows`, last in forward, so that their backward runs first: at that time the gradients of
    the shared and the unconditional experts take no memory yet.
    """

    dispatched: _LocalRows
    experts: Experts

    def combine_rows(self) -> Tensor:
        rows_RD, expert_slot_R, end_E, host_copy = self.dispatched
        host_end_E = None if host_copy is None else host_copy.result()
        return self.experts(rows_RD, ExpertOffsets(expert_slot_R, end_E, host_end_E))


class ExpertParallelDispatcher(Dispatcher):
    """Runs rows through experts that are spread over an ep group, by uneven all-to-all: no row is dropped or padded."""

    def __init__(
        self, num_experts: int, group: Group, region: Region = NO_TENSOR_PARALLEL, expert_tp: bool = False
    ) -> None:
        super().__init__(num_experts, region, expert_tp)
        self.placement = ExpertPlacement(num_experts, group.size)
        self.group = group

    def dispatch_rows(self, rows_RD: Tensor, expert_slot_R: Tensor, max_rows: int) -> DispatchedRows:
        ep, experts_per_rank = self.group.size, self.placement.slots
        send_counts = rows_per_expert(expert_slot_R, ep * experts_per_rank).view(ep, experts_per_rank)
        receive_counts = exchange_counts(send_counts, self.group)
        host_counts = AsyncHostCopy(torch.cat([send_counts.sum(1, keepdim=True), receive_counts], dim=1))
        all_to_all = AsyncAllToAll(self.group)
        return _RemoteRows(all_to_all, all_to_all.start(rows_RD), receive_counts, host_counts)


class _RemoteRows(NamedTuple):
    """Rows for experts on all ranks of the ep group."""

    dispatch_all_to_all: AsyncAllToAll
    rows_RD: Tensor
    receive_counts: Tensor
    """Rows that this rank receives, (source rank, expert)."""
    host_counts: AsyncHostCopy
    """For each rank: rows to it, and rows from it for each expert."""

    @property
    def dropped(self) -> None:
        return None

    def run_experts(self, experts: Experts) -> _RemoteOutputs:
        group = self.dispatch_all_to_all.group
        # Waiting for these numbers is the only time in a layer that the host waits for the GPU.
        rank_counts = self.host_counts.result()
        send = [to_rank for to_rank, *_ in rank_counts]
        receive = [sum(from_rank_E) for _, *from_rank_E in rank_counts]
        count_E = [sum(counts) for counts in zip(*(from_rank_E for _, *from_rank_E in rank_counts), strict=True)]
        received_RD = self.dispatch_all_to_all.wait(self.rows_RD, (send, receive))

        # Rows are received in the order (source rank, expert); experts need them sorted by expert.
        ep, experts_per_rank = self.receive_counts.shape
        expert_of_cell = torch.arange(experts_per_rank, device=received_RD.device).repeat(ep)
        unsorted_R = torch.repeat_interleave(expert_of_cell, self.receive_counts.flatten(), output_size=sum(receive))
        expert_R, order_R = sort_by_expert(unsorted_R, experts_per_rank)
        inverse_R = inverse_permutation(order_R)
        offsets = ExpertOffsets(expert_R, end_offsets(expert_R, experts_per_rank), list(accumulate(count_E)))
        y_RD = experts(Permute.apply(received_RD, order_R, inverse_R), offsets)
        combine_all_to_all = AsyncAllToAll(group, (receive, send))
        return _RemoteOutputs(combine_all_to_all, combine_all_to_all.start(Permute.apply(y_RD, inverse_R, order_R)))


class _RemoteOutputs(NamedTuple):
    """Outputs of experts for tokens of all ranks of the ep group."""

    combine_all_to_all: AsyncAllToAll
    y_RD: Tensor

    def combine_rows(self) -> Tensor:
        return self.combine_all_to_all.wait(self.y_RD)


def end_offsets(expert_R: Tensor, num_experts: int) -> Tensor:
    """For rows sorted by expert: the index after the last row of each expert, int32 (num_experts,)."""
    every_E = torch.arange(num_experts, device=expert_R.device)
    return torch.searchsorted(expert_R, every_E, right=True, out_int32=True)
