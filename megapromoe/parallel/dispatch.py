"""How rows travel to their experts and back.

A route is a list of rows (token, expert, weight). The dispatcher sorts the rows by expert, runs the experts on them,
and adds each row's weighted output to its token. `Dispatcher` does so on one rank; `ExpertParallelDispatcher` sends
rows to the rank that owns the expert in between. Weights never travel: they are applied where the token lives.

Per layer and direction of a token's row the wire carries D·b·(1 - 1/ep) bytes; forward takes three collectives
(counts, rows out, rows back), backward two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megapromoe.parallel.collectives import all_to_all, exchange_counts
from megapromoe.parallel.layout import ExpertPlacement
from megapromoe.parallel.linear import WHOLE, Region
from megapromoe.parallel.mesh import Group

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


class Route(NamedTuple):
    """Rows to compute: token `token_R` (int64) goes to expert `expert_R` (int64, logical) with weight `weight_R`.

    `top_k` > 0 promises that the rows are token-major, exactly top_k for each token: combining is then a permutation
    and a fixed-order sum, the same on every run. 0: any rows in any order.
    """

    token_R: Tensor
    expert_R: Tensor
    weight_R: Tensor
    top_k: int = 0

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
        return Route(self.token_R[start:stop], self.expert_R[start:stop], weight_R[start:stop], self.top_k)


class Dispatcher:
    """Runs rows through experts that all live on this rank."""

    def __init__(self, experts: int, region: Region = WHOLE, expert_tp: bool = False):
        """Args: `experts` E. `region`: the tp group among which the rows are shared out, each computed once;
        with `expert_tp` every rank computes all rows with its slice of each expert instead."""
        self.placement = ExpertPlacement(experts, 1)
        self.region = region
        self.expert_tp = expert_tp

    def __call__(self, x_TD: Tensor, route: Route, experts: Experts) -> Tensor:
        """Sends rows out, runs `experts`, brings them home.

        Args:
            x_TD: tokens (T, D), the same on every rank of the region.
            route: rows over these tokens.
            experts: called with (rows (R, D) sorted by local expert, offs (slots,) int32, local expert (R,) int64).

        Returns:
            (T, D): Σ weight·expert(x) over this rank's rows. In a shared region this is a partial sum.
        """
        if self.expert_tp and self.region.shared:
            mine = route._replace(weight_R=self.region.enter(route.weight_R))
        else:
            mine = route.share(self.region, x_TD.shape[0])
        slot_R = self.placement.slot_E(x_TD.device)[mine.expert_R]
        order_R = torch.argsort(slot_R, stable=True)
        y_RD = self.compute(x_TD.index_select(0, mine.token_R[order_R]), slot_R[order_R], experts)
        return combine(y_RD, order_R, mine, x_TD)

    def compute(self, rows_RD: Tensor, slot_R: Tensor, experts: Experts) -> Tensor:
        """Experts on rows sorted by slot; returns them in the same order."""
        offs = offsets(slot_R, self.placement.slots)
        return experts(rows_RD, offs, slot_R)


class ExpertParallelDispatcher(Dispatcher):
    """Runs rows through experts spread over an ep group, with uneven all-to-all: nothing is dropped or padded."""

    def __init__(self, experts: int, group: Group, region: Region = WHOLE, expert_tp: bool = False):
        super().__init__(experts, region, expert_tp)
        self.placement = ExpertPlacement(experts, group.size)
        self.group = group

    def compute(self, rows_RD: Tensor, slot_R: Tensor, experts: Experts) -> Tensor:
        ep, slots = self.group.size, self.placement.slots
        sent = torch.bincount(slot_R, minlength=ep * slots).view(ep, slots)
        received = exchange_counts(sent, self.group)
        send, receive = torch.stack([sent.sum(1), received.sum(1)]).tolist()  # the layer's one host sync
        arrived = all_to_all(rows_RD, send, receive, self.group)

        # Rows arrive by (source rank, expert); experts want them by expert.
        expert_of_cell = torch.arange(slots, device=sent.device).repeat(ep)
        local_R = torch.repeat_interleave(expert_of_cell, received.flatten(), output_size=sum(receive))
        order_R = torch.argsort(local_R, stable=True)
        y = experts(arrived.index_select(0, order_R), offsets(local_R, slots), local_R[order_R])
        return all_to_all(y.index_select(0, inverse(order_R)), receive, send, self.group)


def offsets(expert_R: Tensor, experts: int) -> Tensor:
    """The row after each expert's last in rows sorted by expert: int32 (experts,)."""
    return torch.bincount(expert_R, minlength=experts).cumsum(0).to(torch.int32)


def inverse(order_R: Tensor) -> Tensor:
    """The permutation that undoes `order_R`."""
    out = torch.empty_like(order_R)
    out[order_R] = torch.arange(order_R.shape[0], device=order_R.device)
    return out


def combine(y_RD: Tensor, order_R: Tensor, route: Route, x_TD: Tensor) -> Tensor:
    """Adds rows (sorted by `order_R`) times their weights to their tokens: (T, D) in x's type."""
    if route.top_k:
        y = y_RD.index_select(0, inverse(order_R)) * route.weight_R.to(y_RD.dtype).unsqueeze(1)
        y = y.view(-1, route.top_k, y.shape[1]).sum(1)
        if y.shape[0] == x_TD.shape[0]:
            return y
        return y.new_zeros(x_TD.shape).index_copy(0, route.token_R[:: route.top_k], y)
    y = y_RD * route.weight_R[order_R].to(y_RD.dtype).unsqueeze(1)
    return y.new_zeros(x_TD.shape).index_add(0, route.token_R[order_R], y)
