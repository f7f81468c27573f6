"""Collectives that know their gradient.

A group of one costs nothing: every function returns its input untouched. Tensors must be contiguous in memory for
the wire; the functions see to it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megapromoe.distributed.mesh import Group


def _all_reduced(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum over the group, in memory of its own.

    A view of what was reduced in place, and not that tensor itself: torch.compile of torch 2.11 gives the gradient of
    an autograd.Function to the wrong output where its forward returns a tensor that it changed in place, without an
    error. Source: pytorch issue 180642.
    """
    out = x.contiguous().clone()
    dist.all_reduce(out, group=group.handle)
    return out.view_as(out)


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _all_reduced(grad, ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return _all_reduced(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _all_reduced(x, group)

    @staticmethod
    def backward(ctx, grad):
        return _all_reduced(grad, ctx.group), None


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.width = group, x.shape[-1]
        parts = [torch.empty_like(x) for _ in range(group.size)]
        dist.all_gather(parts, x.contiguous(), group=group.handle)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx, grad):
        return grad.narrow(-1, ctx.group.rank * ctx.width, ctx.width).contiguous(), None


class Flight:
    """An all-to-all of rows in two halves, so that other work can be enqueued between them, in both directions.

    Forward, the rows leave in `depart` if it is known by then how many go where, else in `arrive`; they are there when
    `arrive` returns. Backward the gradients leave in `arrive` and are waited for in `depart`: autograd runs last what
    was recorded first, so what the forward pass does between the two calls, its backward does while they travel.
    """

    def __init__(self, group: Group, sizes: tuple[list[int], list[int]] | None = None):
        """Args: `sizes`: rows to and from each rank of the group, if known already."""
        self.group, self.sizes = group, sizes
        self.under_way: list[tuple[dist.Work, torch.Tensor, torch.Tensor]] = []  # at most one: what leaves, what comes

    def depart(self, x: torch.Tensor) -> torch.Tensor:
        """Rows (sum(send), ...). The result is for `arrive` alone."""
        return x if self.group.size == 1 else _Depart.apply(x, self)

    def arrive(self, x: torch.Tensor, sizes: tuple[list[int], list[int]] | None = None) -> torch.Tensor:
        """Rows (sum(receive), ...) of what departed, those of rank 0 first; `sizes` if they were not known before."""
        self.sizes = sizes or self.sizes
        return x if self.group.size == 1 else _Arrive.apply(x, self)

    def launch(self, x: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        """Sends rows, or gradients back. Returns what comes; it is complete after `wait`.

        Args: `send`, `receive`: rows of `x` to, and rows of the result from, each rank of the group.
        """
        out, x = x.new_empty(sum(receive), *x.shape[1:]), x.contiguous()
        work = dist.all_to_all_single(out, x, receive, send, group=self.group.handle, async_op=True)
        self.under_way.append((work, x, out))
        return out

    def wait(self) -> torch.Tensor:
        """For what was launched, which is returned; on a GPU the stream waits, not the host."""
        work, _, out = self.under_way.pop()
        work.wait()
        return out


# Between the two, autograd is shown what leaves and not what comes: a gradient must have the shape of its tensor, and
# back and forth travel other numbers of rows.


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, flight):
        ctx.flight = flight
        if flight.sizes is not None:
            flight.launch(x, *flight.sizes)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.flight.wait(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, flight):
        ctx.flight = flight
        if not flight.under_way:
            flight.launch(x, *flight.sizes)
        return flight.wait()

    @staticmethod
    def backward(ctx, grad):
        send, receive = ctx.flight.sizes
        return ctx.flight.launch(grad, receive, send), None


def copy_to(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Enters a region whose ranks each do a part of the work on the same x: identity, backward sums over the group.

    Source: Megatron-LM's conjugate operator f (arXiv 1909.08053, section 3).
    """
    return x if group.size == 1 else _CopyTo.apply(x, group)


def reduce_from(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Leaves such a region: sums the parts over the group, backward is the identity.

    Source: Megatron-LM's conjugate operator g (arXiv 1909.08053, section 3).
    """
    return x if group.size == 1 else _ReduceFrom.apply(x, group)


def sum_over(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Sums statistics of different samples over the group; backward sums the gradients of all ranks' losses."""
    return x if group.size == 1 else _SumOver.apply(x, group)


def gather_last(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Joins equal slices (..., n/size) to (..., n) on every rank; backward keeps the own slice.

    The gradient of the whole must already be the same on every rank of the group.
    """
    return x if group.size == 1 else _GatherLast.apply(x, group)


def exchange_counts(counts: torch.Tensor, group: Group) -> torch.Tensor:
    """Tells every rank how many rows it will get: counts (size, n) by destination -> (size, n) by source."""
    if group.size == 1:
        return counts
    out = torch.empty_like(counts)
    dist.all_to_all_single(out, counts.contiguous(), group=group.handle)
    return out
