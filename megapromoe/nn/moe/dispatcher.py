"""Sends tokens to their experts and combines the experts' outputs.

A router assigns tokens to experts. Each pair of a token and one of its experts is a *row*. A layer makes three calls:

* `Dispatcher.dispatch` sorts the rows by expert and starts to send them to the ranks that hold the experts.
* `Dispatcher.run_experts` applies the experts and starts to send their outputs back.
* `Dispatcher.combine` multiplies each output by its routing weight and adds it to its token.

`Dispatcher` works on one rank, `ExpertParallelDispatcher` (in `expert_parallel_dispatcher.py`) by uneven all-to-all,
and `CapacityDispatcher` (in `capacity_dispatcher.py`) by all-to-all of equal parts. Routing weights are not sent: the
rank of the token applies them.

The caller runs the shared and the unconditional experts between the calls. They overlap the copy of the row counts to
the host, the combine all-to-all and, in backward, both all-to-alls of gradients.

Each all-to-all sends D·b·(1 - 1/ep) bytes for each row, at b bytes an element, if rows are spread evenly over ranks. A
layer needs three collectives forward (row counts, dispatch, combine) and two backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megapromoe.config.expert_placement import ExpertPlacement
from megapromoe.distributed.host_copy import AsyncHostCopy
from megapromoe.nn.moe import expert_linear
from megapromoe.nn.moe.assignment import TokenAssignment
from megapromoe.nn.moe.expert_linear import ExpertOffsets, has_grouped_mm_kernel
from megapromoe.nn.moe.row_permutations import (
    AddToTokens,
    DispatchMetadata,
    GatherTokens,
    RowBiases,
    inverse_permutation,
    sort_by_expert,
)
from megapromoe.nn.tensor_parallel import NO_TENSOR_PARALLEL, Region

Experts = Callable[[Tensor, ExpertOffsets], Tensor]
"""The experts of a rank: rows (R, D) sorted by expert, and the offsets of each expert -> outputs (R, D)."""


class ArrangedRows(Protocol):
    """Rows of tokens, sorted by expert, in the tensor that is sent."""

    @property
    def dropped(self) -> Tensor | None:
        """Share of this rank's rows that were dropped, a scalar; None for dispatchers that drop none."""

    def send(self) -> DispatchedRows:
        """Starts to send them."""


class DispatchedRows(Protocol):
    """Rows that are being sent to their experts."""

    def run_experts(self, experts: Experts) -> OutputRows:
        """Applies the experts and starts to send their outputs back."""


class OutputRows(Protocol):
    """Outputs of experts that are being sent back, or have been."""

    def combine_rows(self) -> Tensor:
        """The outputs (R, D), in the order in which the rows were dispatched."""


class SentRows(DispatchedRows, Protocol):
    """Rows that are being sent to other ranks, with the steps of `run_experts`."""

    def receive(self) -> ReceivedRows:
        """Waits for the rows of other ranks."""

    def send_back(self, y_RD: Tensor) -> SentOutputs:
        """Starts to send the outputs of the received rows back."""


class ReceivedRows(Protocol):
    """Rows of all ranks for the experts of this rank."""

    def outputs(self, experts: Experts) -> Tensor:
        """The outputs of the experts in the order in which the rows were received. Sends nothing."""


class SentOutputs(OutputRows, Protocol):
    """Outputs of experts that are being sent to the ranks of the tokens."""

    def wait(self) -> OutputRows:
        """Waits for the outputs; `combine_rows` of the result sends nothing."""


class ReturnedRows(NamedTuple):
    """Outputs of experts that have been sent back."""

    rows_RD: Tensor

    def combine_rows(self) -> Tensor:
        return self.rows_RD


class Dispatched(NamedTuple):
    """A dispatch whose experts have not run yet."""

    metadata: DispatchMetadata
    rows: DispatchedRows
    dropped: Tensor | None
    """See `ArrangedRows.dropped`."""


class ExpertOutputs(NamedTuple):
    """A dispatch whose experts run."""

    metadata: DispatchMetadata
    rows: OutputRows
    dropped: Tensor | None
    """See `ArrangedRows.dropped`."""


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
        self.region = region
        self.expert_tp = expert_tp
        self.place_experts(ExpertPlacement.contiguous(num_experts, 1))

    def place_experts(self, placement: ExpertPlacement, device: torch.device | str = "cpu") -> None:
        """Sets which ranks have which experts.

        Args:
            placement: over the ranks of the ep group.
            device: of the rows; on another one the table of slots is copied at the first dispatch.
        """
        self.placement, self.ep, self.slots_per_rank = placement, placement.ep, placement.dispatch_slots
        slots = placement.slot_of_expert
        # Without a table if the slots have the numbers of the experts.
        is_numbered = slots == tuple(range(len(slots)))
        self._slot_E = None if is_numbered else torch.tensor(slots, dtype=torch.int64, device=device)

    def slot_of(self, expert_R: Tensor) -> Tensor:
        """Global slots of logical experts, see `ExpertPlacement.slot_of_expert`; int64 of the same shape."""
        if self._slot_E is None:
            return expert_R
        if self._slot_E.device != expert_R.device:
            self._slot_E = self._slot_E.to(expert_R.device)
        return self._slot_E[expert_R]

    def sort_rows(self, expert_R: Tensor) -> tuple[Tensor, Tensor]:
        """Sorts rows by the slots of their experts, the logical `expert_R`.

        Returns:
            the global slot of each sorted row, and the permutation that sorts them, both int64 (R,).
        """
        return sort_by_expert(self.slot_of(expert_R), self.ep * self.slots_per_rank)

    def dispatch(self, x_TD: Tensor, assignment: TokenAssignment, max_tokens: int) -> Dispatched:
        """Sorts the rows by expert and starts to send them.

        Args:
            x_TD: tokens (T, D), the same on every rank of the region.
            assignment: rows over these tokens.
            max_tokens: the largest T of any rank: the tokens of a whole micro-batch.
        """
        metadata, arranged = self.arrange(x_TD, self.shard(assignment, x_TD.shape[0]), max_tokens)
        return Dispatched(metadata, arranged.send(), arranged.dropped)

    @property
    def divides_rows(self) -> bool:
        """Whether each rank of the region computes other rows."""
        return self.region.is_sharded and not self.expert_tp

    def shard(
        self, assignment: TokenAssignment, num_tokens: int, share: tuple[int, int] | None = None
    ) -> TokenAssignment:
        """The rows that this rank of the region computes. In backward the gradient of their weights is sent.

        `share`: see `TokenAssignment.shard`, if it is known.
        """
        if self.divides_rows:
            return assignment.shard(self.region, *(share or assignment.share(self.region, num_tokens)))
        if self.region.is_sharded:
            weight_R = self.region.copy_to_region(assignment.weight_R)
            return TokenAssignment(assignment.token_R, assignment.expert_R, weight_R, assignment.top_k)
        return assignment

    def arrange(
        self, x_TD: Tensor, assignment: TokenAssignment, max_tokens: int
    ) -> tuple[DispatchMetadata, ArrangedRows]:
        """Sorts the rows of `shard` by expert; the arguments are those of `dispatch`. Sends nothing."""
        shards = 1 if self.expert_tp else self.region.size
        max_rows = -(-max_tokens // shards) * max(assignment.top_k, 1)
        expert_slot_R, order_R = self.sort_rows(assignment.expert_R)
        token_R, inverse_R = assignment.tokens_of(order_R), None
        if assignment.top_k:
            inverse_R = inverse_permutation(order_R)
            rows_RD = GatherTokens.apply(x_TD, assignment, token_R, inverse_R)
        else:
            rows_RD = x_TD.index_select(0, token_R)
        weight_R = assignment.weight_R
        if torch.compiler.is_compiling() and assignment.is_shard:
            weight_R = weight_R.clone()  # the offset of a slice would be known to the graph that it enters
        kept = weight_R, assignment.top_k, assignment.first_token, assignment.is_shard
        needs_tokens = inverse_R is None or not torch.compiler.is_compiling()
        metadata = DispatchMetadata(order_R, inverse_R, token_R if needs_tokens else None, *kept)
        return metadata, self.arrange_rows(rows_RD, expert_slot_R, max_rows)

    def run_experts(self, dispatched: Dispatched, experts: Experts) -> ExpertOutputs:
        """Applies the experts to their rows and starts to send the outputs back."""
        return ExpertOutputs(dispatched.metadata, dispatched.rows.run_experts(experts), dispatched.dropped)

    def combine(self, outputs: ExpertOutputs, base_TD: Tensor) -> Tensor:
        """Adds each output, times its routing weight, to its token.

        Args:
            outputs: of `run_experts`.
            base_TD: the rest of the layer's output, (T or more, D); it is overwritten. Compiled, token-major rows are
                not combined by this method but by `add_token_sums`.

        Returns:
            base + Σ weight·expert(x) over the rows of this rank; in a sharded region a partial sum.
        """
        metadata, y_RD = outputs.metadata, outputs.rows.combine_rows()
        if metadata.top_k:
            return AddToTokens.apply(base_TD, y_RD, metadata.weight_R, metadata)
        assert metadata.token_R is not None
        weight_R = metadata.weight_R[metadata.order_R].to(y_RD.dtype)
        return base_TD.index_add(0, metadata.token_R, y_RD * weight_R.unsqueeze(1))

    def arrange_rows(self, rows_RD: Tensor, expert_slot_R: Tensor, max_rows: int) -> ArrangedRows:
        """Prepares rows that are sorted by expert slot for sending.

        Args:
            rows_RD: rows (R, D).
            expert_slot_R: the slot of each row's expert, see `slot_of`; int64 (R,).
            max_rows: the largest R of any rank.
        """
        return _LocalRows(rows_RD, expert_slot_R, end_offsets(expert_slot_R, self.slots_per_rank), None)


class _LocalRows(NamedTuple):
    """Rows for experts on this rank; nothing is sent."""

    rows_RD: Tensor
    expert_slot_R: Tensor
    end_E: Tensor
    host_copy: AsyncHostCopy | None

    @property
    def dropped(self) -> None:
        return None

    def send(self) -> _LocalRows:
        """Starts the copy of the row counts to the host, if it needs them."""
        on_device = has_grouped_mm_kernel(self.rows_RD) or torch.compiler.is_compiling()
        return self if on_device else self._replace(host_copy=AsyncHostCopy(self.end_E))

    def run_experts(self, experts: Experts) -> LocalOutputs:
        return LocalOutputs(self, experts)


class LocalOutputs(NamedTuple):
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

    def rows_and_biases(self) -> tuple[Tensor, RowBiases | None]:
        """As `combine_rows`, but without the biases of the last layer if they are returned; for compiled code."""
        if not isinstance(self.experts, expert_linear.Experts):
            return self.combine_rows(), None
        rows_RD, expert_slot_R, end_E, _ = self.dispatched
        y_RD, bias_ED = self.experts.without_last_bias(rows_RD, ExpertOffsets(expert_slot_R, end_E, None))
        return y_RD, None if bias_ED is None else RowBiases(bias_ED, expert_slot_R)


def end_offsets(expert_R: Tensor, num_experts: int) -> Tensor:
    """For rows sorted by expert: the index after the last row of each expert, int32 (num_experts,)."""
    every_E = torch.arange(num_experts, device=expert_R.device)
    if torch.compiler.is_compiling():  # a sum is part of another kernel
        return (expert_R <= every_E.unsqueeze(1)).sum(1, dtype=torch.int32)
    return torch.searchsorted(expert_R, every_E, right=True, out_int32=True)
