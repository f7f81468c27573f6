"""What the ranks of a sampling or evaluation job do together: join it, agree on errors and values, gather, add up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megapromoe.distributed import runtime
from megapromoe.errors import UserError

T = TypeVar("T")


@contextmanager
def distributed_session(launch: runtime.Launch, timeout: float) -> Iterator[torch.device]:
    """Joins the job of `launch`, and leaves it at the end; gives this rank's device. Collective.

    Args:
        timeout: seconds after which a collective that some rank does not join ends the job.
    """
    if launch.world == 1:
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return
    device = runtime.start(launch, timeout).device
    try:
        yield device
    finally:
        runtime.stop()


def raise_if_any_rank_failed(problem: str | None, launch: runtime.Launch, error: type[UserError]) -> None:
    """Raises `error` on every rank if any has a problem. Collective."""
    problems: list[str | None] = [problem]
    if launch.world > 1:
        problems = [None] * launch.world
        dist.all_gather_object(problems, problem)
    if messages := list(dict.fromkeys(p for p in problems if p)):
        raise error("; ".join(messages))


@contextmanager
def raising_together(
    launch: runtime.Launch, error: type[UserError], catch: tuple[type[Exception], ...] = (UserError, OSError)
) -> Iterator[None]:
    """Runs a block that may fail on some ranks alone; then every rank raises `error` with their messages. Collective.

    Args:
        catch: what the block may raise for the user. Any other exception is a bug and leaves the block as it is.
    """
    problem = None
    try:
        yield
    except catch as caught:
        problem = str(caught)
    raise_if_any_rank_failed(problem, launch, error)


def broadcast_from_rank0(value: T, launch: runtime.Launch) -> T:
    """Rank 0's value, on every rank. Collective."""
    if launch.world == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_to_rank0(value: T, launch: runtime.Launch) -> list[T] | None:
    """Every rank's value on rank 0, in the order of ranks; None on the others. Collective."""
    if launch.world == 1:
        return [value]
    values: list[T] | None = [value] * launch.world if launch.rank == 0 else None
    dist.gather_object(value, values)
    return values


def all_reduce_sum(x: Tensor, launch: runtime.Launch) -> Tensor:
    """The sum of the ranks' tensors, in place. Collective."""
    if launch.world > 1:
        dist.all_reduce(x)
    return x
