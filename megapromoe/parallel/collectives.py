"""Collectives that know their gradient.

A group of one costs nothing: every function returns its input untouched. Tensors must be contiguous in memory for
the wire; the functions see to it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megapromoe.parallel.mesh import Group


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group.handle)
        return grad, None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        out = x.contiguous().clone()
        dist.all_reduce(out, group=group.handle)
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = x.contiguous().clone()
        dist.all_reduce(out, group=group.handle)
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group.handle)
        return grad, None


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


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, send, receive, group):
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(x, send, receive, group)

    @staticmethod
    def backward(ctx, grad):
        return _exchange(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(x: torch.Tensor, send: list[int], receive: list[int], group: Group) -> torch.Tensor:
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group.handle)
    return out


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


def all_to_all(x: torch.Tensor, send: list[int], receive: list[int], group: Group) -> torch.Tensor:
    """Sends the first `send[0]` rows to the group's rank 0, the next `send[1]` to rank 1, ...; returns what arrived.

    Args:
        x: rows (sum(send), ...).
        send, receive: rows to and from each rank of the group; zero is fine.

    Returns:
        rows (sum(receive), ...), those of rank 0 first. Backward sends each gradient row home.
    """
    return x if group.size == 1 else _AllToAll.apply(x, send, receive, group)


def exchange_counts(counts: torch.Tensor, group: Group) -> torch.Tensor:
    """Tells every rank how many rows it will get: counts (size, n) by destination -> (size, n) by source."""
    if group.size == 1:
        return counts
    out = torch.empty_like(counts)
    dist.all_to_all_single(out, counts.contiguous(), group=group.handle)
    return out
