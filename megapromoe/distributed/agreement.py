"""What the ranks of a sampling or evaluation job do together: join, agree, add up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megapromoe.distributed import runtime
from megapromoe.errors import UserError

Value = TypeVar("Value")


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
    if found := dict.fromkeys(p for p in problems if p):
        raise error("; ".join(found))


def broadcast_from_rank0(value: Value, launch: runtime.Launch) -> Value:
    """Rank 0's value, on every rank. Collective."""
    if launch.world == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def all_reduce_sum(x: Tensor, launch: runtime.Launch) -> Tensor:
    """The sum of the ranks' tensors, in place. Collective."""
    if launch.world > 1:
        dist.all_reduce(x)
    return x
