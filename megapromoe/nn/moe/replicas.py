"""Copies of popular experts on other expert-parallel ranks, which compute a part of their rows.

A copy is no parameter. In forward its rank gets the weights from the owner, one all-to-all for a layer (`_StartCopies`,
`_WaitForCopies`); in backward the owner gets the gradients of the copies and adds them to its own. So masters, moments,
averages and checkpoints know one expert, and ZeRO reduces its complete gradient.

Forward, a layer sends weights, row counts and rows, waits for the weights, and runs the experts. Backward, it runs the
experts, sends the gradients of the copies and of the rows, and waits for those of the copies. So both messages overlap
those of rows.

For n copies on a rank and P elements of an expert on a rank, both messages have n·P elements for it. Source of the idea
of copies: DeepSeek-V3, arXiv 2412.19437, section 3.4.1, for inference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megapromoe.config.expert_placement import ExpertPlacement
from megapromoe.distributed.collectives import AsyncAllToAll
from megapromoe.distributed.mesh import Group
from megapromoe.nn.moe.assignment import rows_per_expert
from megapromoe.nn.moe.expert_linear import ExpertOffsets, ExpertParameters, Experts
from megapromoe.nn.moe.row_permutations import sort_by_expert


class RowSplit:
    """Divides the rows of a rank for an expert over the ranks that have it.

    Of n rows a host gets those from floor(n·a + u) to floor(n·b + u), where a and b are the sums of the shares of the
    hosts before it and up to it. u differs from rank to rank, so that rounding of all ranks does not favour one host.
    Each rank decides about its rows alone; the counts that all ranks exchange anyway state the result.

    Letters: H hosts of an expert at most.
    """

    def __init__(self, placement: ExpertPlacement, rank: int, device: torch.device | str = "cpu"):
        """Makes the tables. Args: rank of the ep group; device of the rows, see `Dispatcher.place_experts`."""
        hosts_E = [placement.hosts_of(expert) for expert in range(placement.experts)]
        most = max(map(len, hosts_E))
        # Hosts that do not exist begin after all rows.
        slots = [[slot for slot, _ in hosts] + [0] * (most - len(hosts)) for hosts in hosts_E]
        ends = [[math.fsum(share for _, share in hosts[: i + 1]) for i in range(len(hosts) - 1)] for hosts in hosts_E]
        ends = [of_expert + [1.0] * (most - len(of_expert)) for of_expert in ends]
        self.experts, self.num_slots = placement.experts, placement.ep * placement.dispatch_slots
        self.offset = (rank + 0.5) / placement.ep
        self._slot_EH = torch.tensor(slots, dtype=torch.int64, device=device)
        self._end_EH = torch.tensor(ends, dtype=torch.float64, device=device)

    def sort_rows(self, expert_R: Tensor) -> tuple[Tensor, Tensor]:
        """See `Dispatcher.sort_rows`. The rows of an expert are divided in their order."""
        if self._slot_EH.device != expert_R.device:
            self._slot_EH, self._end_EH = self._slot_EH.to(expert_R.device), self._end_EH.to(expert_R.device)
        sorted_R, order_R = sort_by_expert(expert_R, self.experts)
        count_E = rows_per_expert(sorted_R, self.experts)
        number_R = torch.arange(sorted_R.shape[0], device=sorted_R.device) - (count_E.cumsum(0) - count_E)[sorted_R]
        end_EH = (count_E.unsqueeze(1) * self._end_EH + self.offset).floor()
        host_R = (number_R.unsqueeze(1) >= end_EH[sorted_R]).sum(1)
        slot_R, by_slot_R = sort_by_expert(self._slot_EH[sorted_R, host_R], self.num_slots)
        return slot_R, order_R[by_slot_R]


class ReplicaExchange:
    """Sends the weights of this rank's experts to the ranks that have copies of them, and gradients back."""

    def __init__(self, placement: ExpertPlacement, group: Group):
        """Makes the exchange of one layer. Args: group: the ep group, over which the placement is."""
        owned, owner_E = placement.owned(group.rank), placement.rank_of_expert
        to_rank = [
            [expert for expert in copies if owner_E[expert] == group.rank] for copies in placement.copies_of_rank
        ]
        sources = [owner_E[expert] for expert in placement.copies_of_rank[group.rank]]
        self.group, self.slots = group, placement.slots
        self.sent_slots = [owned.index(expert) for experts in to_rank for expert in experts]
        """The slot of each weight that is sent, by destination."""
        self.sizes = [len(experts) for experts in to_rank], [sources.count(rank) for rank in range(group.size)]
        """Experts to send to, and to receive from, each rank."""

    def start(self, experts: Experts, dtype: torch.dtype) -> ExpertsWithCopies:
        """Starts to send the weights. Collective; the result must be called once.

        Args:
            experts: of this rank.
            dtype: of the rows.
        """
        parameters = experts.parameters_in(dtype)
        transfer = _Transfer(self, [p.shape[1:] for p in parameters])
        return ExpertsWithCopies(experts, transfer, _StartCopies.apply(transfer, *parameters))


@dataclass(frozen=True)
class ExpertsWithCopies:
    """The experts of a rank and its copies of others, as a function like `Experts`."""

    experts: Experts
    transfer: _Transfer
    parameters: ExpertParameters

    def __call__(self, x_RD: Tensor, offsets: ExpertOffsets) -> Tensor:
        """Rows (R, D) sorted by slot, those of copies last -> (R, D)."""
        owned, copies = self.transfer.wait(self.parameters)
        slots, number = self.transfer.exchange.slots, copies[0].shape[0]
        expert_R, end_E, host_end_E = offsets
        assert host_end_E is not None
        split = int(host_end_E[slots - 1])
        x_owned, x_copies = x_RD.split([split, x_RD.shape[0] - split])
        y_owned = self.experts.products(
            x_owned, owned, ExpertOffsets(expert_R[:split], end_E[:slots], host_end_E[:slots])
        )
        if not number:
            return y_owned
        ends = [int(end) - split for end in host_end_E[slots : slots + number]]
        of_copies = ExpertOffsets(expert_R[split:] - slots, end_E[slots : slots + number] - split, ends)
        return torch.cat([y_owned, self.experts.products(x_copies, copies, of_copies)])


class _Transfer:
    """The messages of one call of a layer: weights forward, gradients backward."""

    def __init__(self, exchange: ReplicaExchange, shapes: Sequence[torch.Size]):
        """`shapes`: of the parameters of one expert."""
        self.exchange, self.shapes = exchange, shapes
        self.numbers = [shape.numel() for shape in shapes]
        self.all_to_all = AsyncAllToAll(exchange.group)

    def start(self, parameters: Sequence[Tensor]) -> None:
        """Sends the weights of experts of which others have copies."""
        slots = self.exchange.sent_slots
        rows = [torch.stack([p[slot] for slot in slots]) if slots else p[:0] for p in parameters]
        self.all_to_all.send(self._packed(rows), *self.exchange.sizes)

    def wait(self, parameters: ExpertParameters) -> tuple[ExpertParameters, ExpertParameters]:
        """The parameters of this rank, and those of its copies."""
        results = _WaitForCopies.apply(self, *parameters)
        return results[: len(parameters)], results[len(parameters) :]

    def copies(self) -> list[Tensor]:
        """Waits for the weights of the copies."""
        return [part.contiguous() for part in self._unpacked(self.all_to_all.receive())]

    def send_gradients(self, grads: Sequence[Tensor]) -> None:
        """Sends the gradients of the copies to the owners."""
        send, receive = self.exchange.sizes
        self.all_to_all.send(self._packed(grads), receive, send)

    def add_gradients(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """Adds the gradients of copies to those of their experts, in place, in the order of ranks.

        Sums are in float32 or float64 and rounded once. The gradients are those that the experts have just returned.
        """
        rows_of_slot: dict[int, list[int]] = {}
        for row, slot in enumerate(self.exchange.sent_slots):
            rows_of_slot.setdefault(slot, []).append(row)
        for grad, received in zip(grads, self._unpacked(self.all_to_all.receive()), strict=True):
            precision = torch.promote_types(grad.dtype, torch.float32)
            for slot, rows in rows_of_slot.items():
                total = grad[slot].to(precision)
                for row in rows:
                    total = total + received[row]
                grad[slot] = total
        return grads

    def _packed(self, tensors: Sequence[Tensor]) -> Tensor:
        """The parameters (n, ...) of n experts, one row for each expert."""
        return torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)

    def _unpacked(self, packed: Tensor) -> list[Tensor]:
        parts = packed.split(self.numbers, dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]


# Parameters of this rank pass through both functions, so that backward runs both on every rank, also on one without
# copies, and so that the gradients of the copies are added before anything else sees a gradient of a parameter.


class _StartCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, transfer, *parameters):
        ctx.transfer = transfer
        transfer.start(parameters)
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    def backward(ctx, *grads):
        return None, *ctx.transfer.add_gradients(grads)


class _WaitForCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, transfer, *parameters):
        ctx.transfer = transfer
        return *(p.view_as(p) for p in parameters), *transfer.copies()

    @staticmethod
    def backward(ctx, *grads):
        number = len(grads) // 2
        ctx.transfer.send_gradients(grads[number:])
        return None, *grads[:number]
