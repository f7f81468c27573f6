"""Differentiable collectives.

With a group of one rank every function returns its input. Inputs need not be contiguous.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megapromoe.distributed.mesh import Group


def _all_reduced(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum over the group, in a new tensor.

    It returns a view of the tensor that was reduced in place. If the forward of an autograd.Function returns a tensor
    that it changed in place, torch.compile of torch 2.11 gives the gradient to the wrong output, without an error.
    Source: pytorch issue 180642.
    """
    out = x.contiguous().clone()
    dist.all_reduce(out, group=group.process_group)
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


class _DifferentiableAllReduce(torch.autograd.Function):
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
        dist.all_gather(parts, x.contiguous(), group=group.process_group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx, grad):
        return grad.narrow(-1, ctx.group.rank * ctx.width, ctx.width).contiguous(), None


class AsyncAllToAll:
    """An all-to-all of rows in two calls, `start` and `wait`, between which other work is enqueued; differentiable.

    Forward, `start` sends the rows if the counts are known by then, otherwise `wait` does; `wait` returns the received
    rows. Backward runs in reverse order: the gradients are sent by the backward of `wait` and received by that of
    `start`. So work that forward enqueues between the calls overlaps communication in both directions.
    """

    def __init__(self, group: Group, sizes: tuple[list[int], list[int]] | None = None):
        """Prepares the all-to-all.

        Args:
            group: the ranks.
            sizes: the number of rows to send to, and to receive from, each rank; None if not known yet.
        """
        self.group, self.sizes = group, sizes
        self._pending: list[tuple[dist.Work, torch.Tensor, torch.Tensor]] = []  # at most one: work, input, output

    def start(self, x: torch.Tensor) -> torch.Tensor:
        """Starts with rows (sum of rows to send, ...). The result may only be passed to `wait`."""
        return x if self.group.size == 1 else _Start.apply(x, self)

    def wait(self, x: torch.Tensor, sizes: tuple[list[int], list[int]] | None = None) -> torch.Tensor:
        """The received rows (sum of rows to receive, ...), those of rank 0 first.

        Args:
            x: the result of `start`.
            sizes: see `__init__`, if they were not known there.
        """
        self.sizes = sizes or self.sizes
        return x if self.group.size == 1 else _Wait.apply(x, self)

    @property
    def is_pending(self) -> bool:
        """Whether rows have been sent and not been waited for."""
        return bool(self._pending)

    def send(self, x: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        """Sends rows, or gradients. Returns the output tensor, which is complete after `receive`.

        Args:
            send: the number of rows of `x` for each rank.
            receive: the number of rows of the output from each rank.
        """
        out, x = x.new_empty(sum(receive), *x.shape[1:]), x.contiguous()
        work = dist.all_to_all_single(out, x, receive, send, group=self.group.process_group, async_op=True)
        self._pending.append((work, x, out))
        return out

    def receive(self) -> torch.Tensor:
        """Waits for the output of `send` and returns it; with a GPU the stream waits, not the host."""
        work, _, out = self._pending.pop()
        work.wait()
        return out


# Between `start` and `wait`, autograd gets the tensor that is sent, not the one that is received: a gradient must have
# the shape of its tensor, and the numbers of rows differ in the two directions.


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, all_to_all):
        ctx.all_to_all = all_to_all
        if all_to_all.sizes is not None:
            all_to_all.send(x, *all_to_all.sizes)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.all_to_all.receive(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, all_to_all):
        ctx.all_to_all = all_to_all
        if not all_to_all.is_pending:
            all_to_all.send(x, *all_to_all.sizes)
        return all_to_all.receive()

    @staticmethod
    def backward(ctx, grad):
        send, receive = ctx.all_to_all.sizes
        return ctx.all_to_all.send(grad, receive, send), None


def copy_to_group(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Copies the input, equal on all ranks, to a region that divides the work: identity; backward sums over the group.

    Source: Megatron-LM's conjugate operator f (arXiv 1909.08053, section 3).
    """
    return x if group.size == 1 else _CopyTo.apply(x, group)


def reduce_from_group(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Sums the partial outputs of such a region over the group; backward is the identity.

    Source: Megatron-LM's conjugate operator g (arXiv 1909.08053, section 3).
    """
    return x if group.size == 1 else _ReduceFrom.apply(x, group)


def differentiable_all_reduce(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Sums statistics of different samples over the group; backward sums the gradients of the losses of all ranks."""
    return x if group.size == 1 else _DifferentiableAllReduce.apply(x, group)


def gather_last_dim(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Concatenates equal slices (..., n/size) to (..., n) on every rank; backward returns this rank's slice.

    The gradient of the result must be the same on every rank of the group.
    """
    return x if group.size == 1 else _GatherLast.apply(x, group)


def exchange_counts(counts: torch.Tensor, group: Group) -> torch.Tensor:
    """Exchanges numbers of rows: counts (size, n) by destination -> (size, n) by source. No gradient."""
    if group.size == 1:
        return counts
    out = torch.empty_like(counts)
    dist.all_to_all_single(out, counts.contiguous(), group=group.process_group)
    return out
