"""What the ranks of a job do together outside the model: join it, agree on errors and values, gather, add up.

In a process that has joined no job, all of it is what one rank does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megapromoe.distributed import rendezvous, runtime, watchdog
from megapromoe.distributed.store_channel import StoreChannel
from megapromoe.distributed.watchdog import LEAVING, Watchdog
from megapromoe.errors import ExitCode, UserError

T = TypeVar("T")

STEP_TIMEOUT = 300.0  # seconds, where no run's config says it


@contextmanager
def watched_job(
    launch: runtime.Launch, timeout: float, step_timeout: float = STEP_TIMEOUT, records: Path | None = None
) -> Iterator[runtime.Job]:
    """Joins the job of `launch`, and leaves it at the end; a hang meanwhile is named. Collective.

    Args:
        timeout: seconds after which a collective that some rank does not join ends the job.
        step_timeout: seconds without progress that are a hang; in the start-up at least half of `timeout`.
        records: folder for NCCL's flight records of a hang.
    """
    if records is not None:
        runtime.keep_flight_records(records)
    if launch.world == 1:
        store: dist.Store = dist.HashStore()
        connection = store
    else:
        store = rendezvous.gather(launch, timeout)
        connection = rendezvous.own_connection(store, min(timeout, 30.0))
    channel = StoreChannel(connection, launch.rank, launch.world, min(step_timeout, 30.0), timeout)
    # Alone, nothing tells how long the start-up may take. Together, half the time for which ranks wait for each other:
    # a hang is to be named before a collective gives up, which names nobody.
    extra = math.inf if launch.world == 1 else max(timeout / 2 - step_timeout, 0.0)
    dog = Watchdog(channel, step_timeout, "train.step_timeout", start_extra=extra)
    with closing(channel), watchdog.watching(dog):
        watchdog.starting("joining torch.distributed")
        job = runtime.start(launch, timeout, store)
        try:
            yield job
        except Exception as error:
            if getattr(error, "on_all_ranks", False):  # otherwise others may wait in a collective, and so would `stop`
                watchdog.at(LEAVING)
                runtime.stop()
            elif not isinstance(error, UserError):
                dog.await_verdict(error)
            raise
        watchdog.at(LEAVING)
        runtime.stop()


@contextmanager
def distributed_session(
    launch: runtime.Launch, timeout: float, step_timeout: float = STEP_TIMEOUT
) -> Iterator[torch.device]:
    """As `watched_job`; a rank that is alone joins none. Gives this rank's device."""
    if launch.world == 1:
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return
    with watched_job(launch, timeout, step_timeout) as job:
        yield job.device


def world_size() -> int:
    """Ranks of the job that this process has joined; 1 if it has joined none."""
    return dist.get_world_size() if dist.is_initialized() else 1


def this_rank() -> int:
    """The rank of this process in the job that it has joined; 0 if it has joined none."""
    return dist.get_rank() if dist.is_initialized() else 0


def raise_if_any_rank_failed(
    problem: str | None, error: type[UserError], name_ranks: bool = False, exit_code: int | None = None
) -> None:
    """Raises `error` on every rank if any has a problem. Collective.

    Args:
        name_ranks: say which rank has a problem, unless all have the same. Then a problem that some ranks do not have
            may be that of a node, and the exit code is that of a failure, which is tried again.
        exit_code: of this rank's problem; None: that of `error`.
    """
    problems = all_gather_values((problem, exit_code))
    said = [message for message, _ in problems]
    messages = []
    for message in dict.fromkeys(message for message in said if message):
        everywhere = said.count(message) == len(said)
        messages.append(message if everywhere or not name_ranks else f"rank {said.index(message)}: {message}")
    if not messages:
        return
    raised = error("; ".join(messages))
    codes = {error.exit_code if code is None else code for message, code in problems if message}
    common = not name_ranks or all(said)
    raised.exit_code = codes.pop() if len(codes) == 1 and common else ExitCode.FAILED
    raise raised


@contextmanager
def raising_together(
    error: type[UserError],
    catch: tuple[type[Exception], ...] = (UserError, OSError),
    name_ranks: bool = False,
    exit_code: int | None = None,
) -> Iterator[None]:
    """Runs a block that may fail on some ranks alone; then every rank raises `error` with their messages. Collective.

    The exit code is that of the errors that were raised, if it is the same on all ranks that raised one.

    Args:
        catch: what the block may raise for the user. Any other exception is a bug and leaves the block as it is.
        name_ranks: see `raise_if_any_rank_failed`.
        exit_code: in place of that of the errors.
    """
    problem, code = None, exit_code
    try:
        yield
    except catch as caught:
        problem = str(caught)
        if code is None:
            code = getattr(caught, "exit_code", None)  # an OSError has none
    raise_if_any_rank_failed(problem, error, name_ranks, code)


def broadcast_from_rank0(value: T) -> T:
    """Rank 0's value, on every rank. Collective."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_gather_values(value: T) -> list[T]:
    """Every rank's value on every rank, in the order of ranks. Collective."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def gather_to_rank0(value: T) -> list[T] | None:
    """Every rank's value on rank 0, in the order of ranks; None on the others. Collective."""
    if world_size() == 1:
        return [value]
    values: list[T] | None = [value] * world_size() if this_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of the ranks' tensors, in place. Collective."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x
