"""How rows travel to their experts and back.

A route is a list of rows (token, expert, weight). The dispatcher sorts the rows by expert, runs the experts on them,
and adds each row's weighted output to its token. `Dispatcher` does so on one rank; `ExpertParallelDispatcher` sends
rows to the rank that owns the expert in between. Weights never travel: they are applied where the token lives.

A dispatch has three stages: `begin`, `compute` and `finish`. What needs no routing, the shared and the unconditional
expert, stands between them, half and half: it covers the way of the counts to the host and of the rows home, and in
backward both ways of the gradients.

Per layer and direction of a token's row the wire carries D·b·(1 - 1/ep) bytes; forward takes three collectives
(counts, rows out, rows back), backward two.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megapromoe.distributed.collectives import Flight, exchange_counts
from megapromoe.distributed.host_copy import OnTheWay
from megapromoe.distributed.mesh import Group
from megapromoe.distributed.parameter_layout import ExpertPlacement
from megapromoe.nn.moe.expert_linear import Segments, in_one_kernel
from megapromoe.nn.tensor_parallel import WHOLE, Region

Experts = Callable[[Tensor, Segments], Tensor]


class Route(NamedTuple):
    """Rows to compute: token `token_R` (int64) goes to expert `expert_R` (int64, logical) with weight `weight_R`.

    `top_k` > 0 promises that the rows are token-major: exactly top_k for each token from `first` on. Combining is then
    a permutation and a fixed-order sum, the same on every run. 0: any rows in any order.
    """

    token_R: Tensor
    expert_R: Tensor
    weight_R: Tensor
    top_k: int = 0
    first: int = 0

    def tokens_of(self, row_R: Tensor) -> Tensor:
        """The tokens of some rows."""
        if not self.top_k:
            return self.token_R[row_R]
        token_R = row_R if self.top_k == 1 else row_R // self.top_k
        return token_R + self.first if self.first else token_R

    def share(self, region: Region, tokens: int) -> Route:
        """The part of the rows that this rank of a shared region computes: a contiguous 1/size of them.

        Whole tokens where rows are token-major; the weights enter the region so that their gradient is complete.
        """
        if not region.shared:
            return self
        per = max(self.top_k, 1)
        units = tokens if self.top_k else self.token_R.shape[0]
        start, stop = (units * r // region.size * per for r in (region.rank, region.rank + 1))
        weight_R = region.enter(self.weight_R)
        first = self.first + start // per if self.top_k else 0
        return Route(self.token_R[start:stop], self.expert_R[start:stop], weight_R[start:stop], self.top_k, first)


class SentRows(Protocol):
    """Rows on their way to their experts."""

    def run(self, experts: Experts) -> ReturningRows:
        """Runs the experts, and starts with their outputs whatever needs no waiting."""


class ReturningRows(Protocol):
    """Outputs of experts on their way back."""

    def receive(self) -> Tensor:
        """The outputs (R, D), in the order in which the rows were sent."""


class Dispatch(NamedTuple):
    """A dispatch before its experts run."""

    route: Route
    """Of this rank."""
    token_R: Tensor
    """The rows' tokens, sorted by expert."""
    order_R: Tensor
    """The route's rows, sorted by expert."""
    back_R: Tensor | None
    """Undoes `order_R`; None for rows in any order."""
    rows: SentRows


class Computed(NamedTuple):
    """A dispatch whose experts run."""

    begun: Dispatch
    rows: ReturningRows


class Dispatcher:
    """Runs rows through experts that all live on this rank.

    Without a host sync where the experts are one kernel: all sizes are those of the route. Elsewhere with one.
    """

    def __init__(self, experts: int, region: Region = WHOLE, expert_tp: bool = False):
        """Args: `experts` E. `region`: the tp group among which the rows are shared out, each computed once;
        with `expert_tp` every rank computes all rows with its slice of each expert instead."""
        self.placement = ExpertPlacement(experts, 1)
        self.region = region
        self.expert_tp = expert_tp

    def begin(self, x_TD: Tensor, route: Route, most: int) -> Dispatch:
        """Sends rows to their experts.

        Args:
            x_TD: tokens (T, D), the same on every rank of the region.
            route: rows over these tokens.
            most: tokens that any rank may have, at least T: those of a whole micro-batch.
        """
        if self.expert_tp and self.region.shared:
            mine = route._replace(weight_R=self.region.enter(route.weight_R))
        else:
            mine = route.share(self.region, x_TD.shape[0])
        shares = 1 if self.expert_tp else self.region.size
        most = -(-most // shares) * max(mine.top_k, 1)
        slot_R, order_R = torch.sort(self.placement.slot_of(mine.expert_R), stable=True)
        token_R = mine.tokens_of(order_R)
        if mine.top_k:
            back_R = inverse(order_R)
            rows_RD = _Gather.apply(x_TD, mine, token_R, back_R)
        else:
            rows_RD, back_R = x_TD.index_select(0, token_R), None
        return Dispatch(mine, token_R, order_R, back_R, self.send(rows_RD, slot_R, most))

    def compute(self, begun: Dispatch, experts: Experts) -> Computed:
        """Runs the experts and sends the rows home.

        Args: `experts`: called with rows (R, D), sorted by local expert, and their `Segments`.
        """
        return Computed(begun, begun.rows.run(experts))

    def finish(self, computed: Computed, base_TD: Tensor) -> Tensor:
        """Adds the rows to their tokens.

        Args: `base_TD`: what else makes up the output, (T or more, D); it is overwritten.

        Returns base + Σ weight·expert(x) over this rank's rows. In a shared region this is a partial sum.
        """
        mine, token_R, order_R, back_R, _ = computed.begun
        y_RD = computed.rows.receive()
        if mine.top_k:
            return _Combine.apply(base_TD, y_RD, mine.weight_R, mine, token_R, order_R, back_R)
        return base_TD.index_add(0, token_R, y_RD * mine.weight_R[order_R].to(y_RD.dtype).unsqueeze(1))

    def send(self, rows_RD: Tensor, slot_R: Tensor, most: int) -> SentRows:
        """Starts with rows, sorted by slot, whatever needs no waiting. No rank has more than `most` of them."""
        offs_E = offsets(slot_R, self.placement.slots)
        ends = None if in_one_kernel(rows_RD) else OnTheWay(offs_E)
        return _LocalRows(rows_RD, slot_R, offs_E, ends)


class _LocalRows(NamedTuple):
    """Rows for experts on this rank: nothing travels."""

    rows_RD: Tensor
    slot_R: Tensor
    offs_E: Tensor
    ends: OnTheWay | None

    def run(self, experts: Experts) -> _LocalOutputs:
        return _LocalOutputs(self, experts)


class _LocalOutputs(NamedTuple):
    """The experts run in `receive`: the last part of forward is the first of backward, when the gradients of the shared
    and the unconditional expert need no memory yet."""

    sent: _LocalRows
    experts: Experts

    def receive(self) -> Tensor:
        rows_RD, slot_R, offs_E, ends = self.sent
        return self.experts(rows_RD, Segments(slot_R, offs_E, None if ends is None else ends.on_host()))


class ExpertParallelDispatcher(Dispatcher):
    """Runs rows through experts spread over an ep group, with uneven all-to-all: nothing is dropped or padded."""

    def __init__(self, experts: int, group: Group, region: Region = WHOLE, expert_tp: bool = False):
        super().__init__(experts, region, expert_tp)
        self.placement = ExpertPlacement(experts, group.size)
        self.group = group

    def send(self, rows_RD: Tensor, slot_R: Tensor, most: int) -> SentRows:
        ep, slots = self.group.size, self.placement.slots
        sent = counts(slot_R, ep * slots).view(ep, slots)
        received = exchange_counts(sent, self.group)
        numbers = OnTheWay(torch.cat([sent.sum(1, keepdim=True), received], dim=1))
        flight = Flight(self.group)
        return _TravellingRows(flight, flight.depart(rows_RD), received, numbers)


class _TravellingRows(NamedTuple):
    """Rows for experts on other ranks."""

    flight: Flight
    rows_RD: Tensor
    received: Tensor
    """Rows that come to this rank, (source rank, expert)."""
    numbers: OnTheWay
    """Of each rank: rows to it, and rows from it for each expert."""

    def run(self, experts: Experts) -> _TravellingOutputs:
        flight, rows_RD, received, numbers = self
        to_rank, *come_E = zip(*numbers.on_host(), strict=True)  # the layer's one wait; of each rank
        send, receive = list(to_rank), [sum(come) for come in zip(*come_E, strict=True)]
        arrived = flight.arrive(rows_RD, (send, receive))

        # Rows arrive by (source rank, expert); experts want them by expert.
        ep, slots = received.shape
        expert_of_cell = torch.arange(slots, device=received.device).repeat(ep)
        local_R = torch.repeat_interleave(expert_of_cell, received.flatten(), output_size=sum(receive))
        local_R, order_R = torch.sort(local_R, stable=True)
        back_R = inverse(order_R)
        segments = Segments(local_R, offsets(local_R, slots), list(accumulate(map(sum, come_E))))
        y_RD = experts(_Permute.apply(arrived, order_R, back_R), segments)
        home = Flight(flight.group, (receive, send))
        return _TravellingOutputs(home, home.depart(_Permute.apply(y_RD, back_R, order_R)))


class _TravellingOutputs(NamedTuple):
    """Outputs of experts for other ranks' tokens."""

    flight: Flight
    y_RD: Tensor

    def receive(self) -> Tensor:
        return self.flight.arrive(self.y_RD)


def counts(expert_R: Tensor, experts: int) -> Tensor:
    """Rows of each expert, int64 (experts,). Unlike bincount, without asking a GPU how many there are."""
    return expert_R.new_zeros(experts).scatter_add_(0, expert_R, torch.ones_like(expert_R))


def offsets(expert_R: Tensor, experts: int) -> Tensor:
    """The row after each expert's last in rows sorted by expert: int32 (experts,)."""
    every_E = torch.arange(experts, device=expert_R.device)
    return torch.searchsorted(expert_R, every_E, right=True, out_int32=True)


def inverse(order_R: Tensor) -> Tensor:
    """The permutation that undoes `order_R`."""
    out = torch.empty_like(order_R)
    out[order_R] = torch.arange(order_R.shape[0], device=order_R.device)
    return out


# Permutations whose backward is the inverse permutation: autograd's would add into zeros.


class _Permute(torch.autograd.Function):
    """rows[order]."""

    @staticmethod
    def forward(ctx, rows_RD, order_R, back_R):
        ctx.save_for_backward(back_R)
        return rows_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx, grad_RD):
        (back_R,) = ctx.saved_tensors
        return grad_RD.index_select(0, back_R), None, None


class _Gather(torch.autograd.Function):
    """The token of each row of a token-major route, the rows sorted by expert."""

    @staticmethod
    def forward(ctx, x_TD, route, token_R, back_R):
        ctx.save_for_backward(back_R)
        ctx.shape, ctx.top_k, ctx.first = x_TD.shape, route.top_k, route.first
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx, grad_RD):
        (back_R,) = ctx.saved_tensors
        grad_TD = grad_RD.index_select(0, back_R)
        if ctx.top_k > 1:
            grad_TD = grad_TD.view(-1, ctx.top_k, grad_TD.shape[1]).sum(1)
        if grad_TD.shape[0] < ctx.shape[0]:  # the other tokens are other ranks' of the region
            whole = grad_TD.new_zeros(ctx.shape)
            whole[ctx.first : ctx.first + grad_TD.shape[0]] = grad_TD
            grad_TD = whole
        return grad_TD, None, None, None


class _Combine(torch.autograd.Function):
    """base + Σ weight·row, rows of a token-major route, sorted by expert; writes into `base_TD`."""

    @staticmethod
    def forward(ctx, base_TD, y_RD, weight_R, route, token_R, order_R, back_R):
        K, weight_R = route.top_k, weight_R.to(y_RD.dtype)
        home_TKD = y_RD.index_select(0, back_R).view(-1, K, y_RD.shape[1])
        out_TD = base_TD[route.first : route.first + home_TKD.shape[0]]
        weight_TK = weight_R.view(-1, K, 1)
        for k in range(K):
            out_TD.addcmul_(home_TKD[:, k], weight_TK[:, k])
        ctx.mark_dirty(base_TD)
        ctx.save_for_backward(y_RD, weight_R, token_R, order_R, back_R)
        return base_TD

    @staticmethod
    def backward(ctx, grad_TD):
        y_RD, weight_R, token_R, order_R, back_R = ctx.saved_tensors
        grad_RD = grad_TD.index_select(0, token_R)
        # A dot product for each row, summed in float32; float32 copies of the rows would be the layer's peak.
        grad_weight_R = (grad_RD * y_RD).sum(-1, dtype=torch.float32)[back_R]
        return grad_TD, grad_RD.mul_(weight_R[order_R].unsqueeze(1)), grad_weight_R, None, None, None, None
