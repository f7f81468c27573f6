"""Dispatch to experts of other ranks by uneven all-to-all: no row is dropped or padded.

Messages and computation are separate functions, because `nn/compiled_parts.py` compiles the latter: `_RowsToSend` and
the functions `outputs` compute, all others send and wait.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from megapromoe.config.expert_placement import ExpertPlacement
from megapromoe.distributed.collectives import AsyncAllToAll, exchange_counts
from megapromoe.distributed.host_copy import AsyncHostCopy
from megapromoe.distributed.mesh import Group
from megapromoe.nn.moe.assignment import rows_per_expert
from megapromoe.nn.moe.dispatcher import Dispatcher, Experts, ReturnedRows, end_offsets
from megapromoe.nn.moe.expert_linear import ExpertOffsets
from megapromoe.nn.moe.replicas import RowSplit
from megapromoe.nn.moe.row_permutations import Permute, inverse_permutation, sort_by_expert
from megapromoe.nn.tensor_parallel import NO_TENSOR_PARALLEL, Region


class ExpertParallelDispatcher(Dispatcher):
    """Runs rows through experts that are spread over an ep group, by uneven all-to-all: no row is dropped or padded."""

    def __init__(
        self, num_experts: int, group: Group, region: Region = NO_TENSOR_PARALLEL, expert_tp: bool = False
    ) -> None:
        super().__init__(num_experts, region, expert_tp)
        self.group = group
        self.place_experts(ExpertPlacement.contiguous(num_experts, group.size))

    def place_experts(self, placement: ExpertPlacement, device: torch.device | str = "cpu") -> None:
        """See `Dispatcher`. The rows of an expert of which other ranks have copies are divided over these ranks."""
        super().place_experts(placement, device)
        self._split = RowSplit(placement, self.group.rank, device) if placement.replicas else None

    def sort_rows(self, expert_R: Tensor) -> tuple[Tensor, Tensor]:
        return super().sort_rows(expert_R) if self._split is None else self._split.sort_rows(expert_R)

    def arrange_rows(self, rows_RD: Tensor, expert_slot_R: Tensor, max_rows: int) -> _RowsToSend:
        ep, experts_per_rank = self.ep, self.slots_per_rank
        send_counts = rows_per_expert(expert_slot_R, ep * experts_per_rank).view(ep, experts_per_rank)
        return _RowsToSend(rows_RD, send_counts, send_counts.sum(1, keepdim=True), self.group)


class _RowsToSend(NamedTuple):
    """Rows for experts on all ranks of the ep group."""

    rows_RD: Tensor
    send_counts: Tensor
    """Rows that this rank sends, (destination rank, expert)."""
    rank_counts: Tensor
    """Rows that this rank sends, (destination rank, 1)."""
    group: Group

    @property
    def dropped(self) -> None:
        return None

    def send(self) -> _SentRows:
        """Exchanges the row counts, and starts to copy them to the host. The rows are sent by `_SentRows.receive`."""
        receive_counts = exchange_counts(self.send_counts, self.group)
        host_counts = AsyncHostCopy(torch.cat([self.rank_counts, receive_counts], dim=1))
        all_to_all = AsyncAllToAll(self.group)
        return _SentRows(all_to_all, all_to_all.start(self.rows_RD), receive_counts, host_counts)


class _SentRows(NamedTuple):
    """The same rows on their way to the ranks of their experts."""

    dispatch_all_to_all: AsyncAllToAll
    rows_RD: Tensor
    receive_counts: Tensor
    """Rows that this rank receives, (source rank, expert)."""
    host_counts: AsyncHostCopy
    """For each rank: rows to it, and rows from it for each expert."""

    def run_experts(self, experts: Experts) -> _SentOutputs:
        return self.send_back(self.receive().outputs(experts))

    def receive(self) -> _ReceivedRows:
        """Sends the rows and waits for those of other ranks."""
        # Waiting for these numbers is the only time in a layer that the host waits for the GPU.
        rank_counts = self.host_counts.result()
        send = [to_rank for to_rank, *_ in rank_counts]
        receive = [sum(from_rank_E) for _, *from_rank_E in rank_counts]
        count_E = [sum(counts) for counts in zip(*(from_rank_E for _, *from_rank_E in rank_counts), strict=True)]
        received_RD = self.dispatch_all_to_all.wait(self.rows_RD, (send, receive))
        return _ReceivedRows(received_RD, self.receive_counts, list(accumulate(count_E)))

    def send_back(self, y_RD: Tensor) -> _SentOutputs:
        """Starts to send the outputs of the received rows to the ranks of their tokens."""
        assert self.dispatch_all_to_all.sizes is not None  # since `receive`
        send, receive = self.dispatch_all_to_all.sizes
        combine_all_to_all = AsyncAllToAll(self.dispatch_all_to_all.group, (receive, send))
        return _SentOutputs(combine_all_to_all, combine_all_to_all.start(y_RD))


class _ReceivedRows(NamedTuple):
    """Rows of all ranks for the experts of this rank."""

    rows_RD: Tensor
    """In the order (source rank, expert)."""
    receive_counts: Tensor
    """(source rank, expert)."""
    host_end_E: list[int] | Tensor | None
    """See `ExpertOffsets`."""

    def outputs(self, experts: Experts) -> Tensor:
        """The outputs of the experts in the order of the rows, (R, D)."""
        # Experts need the rows sorted by expert.
        ep, experts_per_rank = self.receive_counts.shape
        expert_of_cell = torch.arange(experts_per_rank, device=self.rows_RD.device).repeat(ep)
        counts, num_rows = self.receive_counts.flatten(), self.rows_RD.shape[0]
        unsorted_R = torch.repeat_interleave(expert_of_cell, counts, output_size=num_rows)
        expert_R, order_R = sort_by_expert(unsorted_R, experts_per_rank)
        inverse_R = inverse_permutation(order_R)
        offsets = ExpertOffsets(expert_R, end_offsets(expert_R, experts_per_rank), self.host_end_E)
        y_RD = experts(Permute.apply(self.rows_RD, order_R, inverse_R), offsets)
        return Permute.apply(y_RD, inverse_R, order_R)


class _SentOutputs(NamedTuple):
    """Outputs of experts on their way to the ranks of the tokens."""

    combine_all_to_all: AsyncAllToAll
    y_RD: Tensor

    def combine_rows(self) -> Tensor:
        return self.wait().combine_rows()

    def wait(self) -> ReturnedRows:
        """Waits for the outputs of this rank's rows."""
        return ReturnedRows(self.combine_all_to_all.wait(self.y_RD))
