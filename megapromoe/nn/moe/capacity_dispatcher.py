"""Rows travel in boxes of one size: nothing waits for counts, and all shapes are known before a step.

Each rank has room for `capacity` rows for each expert, so many of them whatever the routing: rows past it are dropped
(their tokens keep the shared expert's output), room that is left travels as zeros. In exchange no count is exchanged or
copied to the host: two collectives forward, two backward, of equal parts, which a CUDA graph can capture.

Which rows are dropped depends on what a rank holds, so training is no longer one function of the configuration at every
layout. Source: GShard, arXiv 2006.16668, and Switch Transformer, arXiv 2101.03961, "expert capacity".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megapromoe.distributed.collectives import Flight
from megapromoe.distributed.mesh import Group
from megapromoe.distributed.parameter_layout import ExpertPlacement
from megapromoe.nn.moe.dispatcher import Dispatcher, Experts, SentRows, counts
from megapromoe.nn.moe.expert_linear import Segments
from megapromoe.nn.tensor_parallel import WHOLE, Region


class StaticDispatcher(Dispatcher):
    """Runs rows through experts spread over an ep group (of one rank or more), `capacity` rows from each rank."""

    def __init__(
        self, experts: int, group: Group, factor: float, region: Region = WHOLE, expert_tp: bool = False
    ) -> None:
        """Args: `factor`: room for rows over an even share of them; 1 has room for all only if routing is even."""
        super().__init__(experts, region, expert_tp)
        self.placement = ExpertPlacement(experts, group.size)
        self.group, self.factor = group, factor
        self.dropped = torch.zeros(())
        """Share of the rows of the last call that were dropped."""

    def capacity(self, most: int) -> int:
        """Rows of one rank for one expert: factor·most/E, where no rank has more than `most` rows."""
        return max(1, math.ceil(self.factor * most / self.placement.experts))

    def send(self, rows_RD: Tensor, slot_R: Tensor, most: int) -> SentRows:
        ep, slots, C = self.group.size, self.placement.slots, self.capacity(most)
        device = rows_RD.device
        count = counts(slot_R, ep * slots)
        place_R = torch.arange(slot_R.shape[0], device=device) - (count.cumsum(0) - count)[slot_R]
        # Rows without room share one last place, which does not travel.
        box_R = torch.where(place_R < C, slot_R * C + place_R, ep * slots * C)
        self.dropped = (place_R >= C).float().sum() / max(slot_R.shape[0], 1)
        boxes = _IntoBoxes.apply(rows_RD, box_R, ep * slots * C)
        even = [slots * C] * ep
        flight = Flight(self.group, (even, even))
        return _Boxes(flight, flight.depart(boxes), box_R, slots, C)


class _Boxes(NamedTuple):
    """Places for rows on their way to the experts."""

    flight: Flight
    boxes: Tensor
    """(ep · slots · capacity, D)."""
    box_R: Tensor
    """The place of each row."""
    slots: int
    """Experts of a rank."""
    capacity: int
    """Places for the rows of one rank for one expert."""

    def run(self, experts: Experts) -> _ReturningBoxes:
        flight, boxes, box_R, slots, C = self
        ep, D = flight.group.size, boxes.shape[1]
        arrived = flight.arrive(boxes)
        # (source rank, expert, row) -> (expert, source rank, row), and back.
        by_expert = arrived.view(ep, slots, C, D).transpose(0, 1).reshape(-1, D)
        slot_E = torch.arange(slots, device=boxes.device)
        offs_E = ((slot_E + 1) * ep * C).to(torch.int32)
        ends_E = [(slot + 1) * ep * C for slot in range(slots)]
        y = experts(by_expert, Segments(slot_E.repeat_interleave(ep * C), offs_E, ends_E))
        y = y.view(slots, ep, C, D).transpose(0, 1).reshape(-1, D)
        home = Flight(flight.group, flight.sizes)
        return _ReturningBoxes(home, home.depart(y), box_R)


class _ReturningBoxes(NamedTuple):
    """The same places, with the experts' outputs, on their way back."""

    flight: Flight
    boxes: Tensor
    box_R: Tensor

    def receive(self) -> Tensor:
        return _OutOfBoxes.apply(self.flight.arrive(self.boxes), self.box_R)


# Each is the other's backward; autograd's would copy all boxes for the sake of the one place that does not travel.


class _IntoBoxes(torch.autograd.Function):
    """Rows (R, D) to their places (places, D); those of place `places` are dropped, and empty places are zero."""

    @staticmethod
    def forward(ctx, rows_RD, box_R, places):
        ctx.save_for_backward(box_R)
        return _fill(rows_RD, box_R, places)

    @staticmethod
    def backward(ctx, grad):
        return _take(grad, *ctx.saved_tensors), None, None


class _OutOfBoxes(torch.autograd.Function):
    """The rows of these places, zero for dropped ones."""

    @staticmethod
    def forward(ctx, boxes, box_R):
        ctx.save_for_backward(box_R)
        ctx.places = boxes.shape[0]
        return _take(boxes, box_R)

    @staticmethod
    def backward(ctx, grad_RD):
        return _fill(grad_RD, *ctx.saved_tensors, ctx.places), None


def _fill(rows_RD: Tensor, box_R: Tensor, places: int) -> Tensor:
    return rows_RD.new_zeros(places + 1, rows_RD.shape[1]).index_copy_(0, box_R, rows_RD)[:-1]


def _take(boxes: Tensor, box_R: Tensor) -> Tensor:
    places = boxes.shape[0]
    rows_RD = boxes.index_select(0, box_R.clamp(max=places - 1))
    return rows_RD.masked_fill_((box_R == places).unsqueeze(1), 0)
