"""Joining a job, and collectives on errors and small values, for code outside the model.

Without torch.distributed the functions act as in a job of one rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megapromoe.distributed import rendezvous, runtime, watchdog
from megapromoe.distributed.launch_environment import StoreUnreachable
from megapromoe.distributed.store_channel import StoreChannel
from megapromoe.distributed.watchdog import LEAVING, Watchdog
from megapromoe.errors import ExitCode, UserError

T = TypeVar("T")

STEP_TIMEOUT = 300.0  # seconds; for commands without the option train.step_timeout
POLL = 0.2  # seconds between two checks of how many ranks have finished
STORE_GRACE = 10.0  # seconds that rank 0 keeps the store open for the others after all ranks have finished


@contextmanager
def watched_job(
    launch: runtime.LaunchEnvironment, timeout: float, step_timeout: float = STEP_TIMEOUT, records: Path | None = None
) -> Iterator[runtime.Job]:
    """Initializes torch.distributed for the block, watched by a watchdog that reports hangs. Collective.

    Args:
        timeout: time-out of collectives, in seconds.
        step_timeout: seconds without progress that count as a hang; during start-up at least half of `timeout`.
        records: folder for the output of NCCL's flight recorder in a hang.
    """
    if records is not None:
        runtime.enable_flight_records(records)
    # A single rank has no limit beyond the given ones. With several ranks the watchdog must report a hang before a
    # collective times out, since the error of a collective names no rank.
    longest = math.inf if launch.world == 1 else max(timeout - watchdog.verdict_time(step_timeout), timeout / 2)
    with connected_ranks(launch, timeout, step_timeout, "train.step_timeout", longest, records) as ranks:
        watchdog.starting("joining torch.distributed")
        job = runtime.init_process_group(launch, timeout, ranks.store)
        try:
            yield job
        except Exception as error:
            # With an error on some ranks only, the others may wait in a collective, and destroying the process group
            # would wait as well.
            if getattr(error, "on_all_ranks", False):
                watchdog.at(LEAVING)
                runtime.destroy_process_group()
            elif not isinstance(error, UserError):
                ranks.watchdog.await_verdict(error)
            raise
        watchdog.at(LEAVING)
        runtime.destroy_process_group()


@dataclass(frozen=True)
class ConnectedRanks:
    """The ranks of a job, connected through its store and watched by a watchdog; there is no process group.

    Attributes:
        store: the key-value store of the job.
        channel: this rank's messages through the store.
        watchdog: of this rank.
    """

    store: dist.Store
    channel: StoreChannel
    watchdog: Watchdog

    def wait_for_all(self) -> None:
        """A barrier over all ranks. The watchdog limits the wait. Collective."""
        watchdog.at("waiting for the other ranks")
        # If the store does not answer, the watchdog ends this process after its limit, with a message.
        with suppress(StoreUnreachable):
            self.channel.count("finished")
        while not self._all_counted("finished"):
            time.sleep(POLL)
        with suppress(StoreUnreachable):
            self.channel.count("left")
        deadline = time.monotonic() + STORE_GRACE
        while self.channel.rank == 0 and not self._all_counted("left") and time.monotonic() < deadline:
            time.sleep(POLL)  # rank 0 may hold the store, which the others still read

    def _all_counted(self, name: str) -> bool:
        with suppress(StoreUnreachable):
            return self.channel.count(name, 0) >= self.channel.world
        return False


@contextmanager
def connected_ranks(
    launch: runtime.LaunchEnvironment,
    timeout: float,
    step_timeout: float,
    limit_name: str,
    longest: float = math.inf,
    records: Path | None = None,
) -> Iterator[ConnectedRanks]:
    """Connects the ranks of `launch` through a store and watches them with a watchdog during the block. Collective.

    Args:
        timeout: seconds to wait for the other ranks.
        step_timeout: seconds without progress that count as a hang; during start-up at least half of `timeout`, and
            without limit in a job of one rank.
        limit_name: the option that sets `step_timeout`, for messages.
        longest, records: `longest` and `flight_records` of `Watchdog`.
    """
    if launch.world == 1:
        store: dist.Store = dist.HashStore()
        connection = store
    else:
        store = rendezvous.connect_all_ranks(launch, timeout)
        connection = rendezvous.clone_connection(store, min(timeout, 30.0))
    channel = StoreChannel(connection, launch.rank, launch.world, min(step_timeout, 30.0), timeout)
    extra = math.inf if launch.world == 1 else max(timeout / 2 - step_timeout, 0.0)
    job_watchdog = Watchdog(
        channel, step_timeout, limit_name, start_extra=extra, longest=longest, flight_records=records
    )
    with closing(channel), watchdog.watched_by(job_watchdog):
        yield ConnectedRanks(store, channel, job_watchdog)


@contextmanager
def distributed_session(
    launch: runtime.LaunchEnvironment, timeout: float, step_timeout: float = STEP_TIMEOUT
) -> Iterator[torch.device]:
    """As `watched_job`, but without torch.distributed in a job of one rank. Yields this rank's device."""
    if launch.world == 1:
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return
    with watched_job(launch, timeout, step_timeout) as job:
        yield job.device


def world_size() -> int:
    """Number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def this_rank() -> int:
    """Rank of this process; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def raise_if_any_rank_failed(
    problem: str | None, error: type[UserError], name_ranks: bool = False, exit_code: int | None = None
) -> None:
    """Raises `error` on every rank if any rank has a problem. Collective.

    Args:
        problem: message of this rank's problem; None or "" if it has none.
        error: class of the error.
        name_ranks: put the rank before its message, unless all ranks have the same message. A problem of some ranks
            only may be that of a node; the exit code is then that of a failure, which the launchers try again.
        exit_code: exit code of this rank's problem; None: that of `error`.
    """
    problems = all_gather_values((problem, exit_code))
    messages = [message for message, _ in problems]  # by rank
    parts = []
    for message in dict.fromkeys(message for message in messages if message):
        on_all_ranks = messages.count(message) == len(messages)
        parts.append(message if on_all_ranks or not name_ranks else f"rank {messages.index(message)}: {message}")
    if not parts:
        return
    raised = error("; ".join(parts))
    codes = {error.exit_code if code is None else code for message, code in problems if message}
    common = not name_ranks or all(messages)
    raised.exit_code = codes.pop() if len(codes) == 1 and common else ExitCode.FAILED
    raise raised


@contextmanager
def raising_together(
    error: type[UserError],
    catch: tuple[type[Exception], ...] = (UserError, OSError),
    name_ranks: bool = False,
    exit_code: int | None = None,
) -> Iterator[None]:
    """Runs a block that may fail on some ranks only; every rank then raises `error`, with all messages. Collective.

    The exit code is that of the caught errors, if all ranks that caught one have the same.

    Args:
        error: class of the error that is raised.
        catch: exceptions of the block that are user errors. Any other exception is a bug and is not caught.
        name_ranks: see `raise_if_any_rank_failed`.
        exit_code: used in place of the exit code of the caught errors.
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
    """The values of all ranks, on every rank, in the order of ranks. Collective. `value` can be pickled."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def gather_to_rank0(value: T) -> list[T] | None:
    """The values of all ranks on rank 0, in the order of ranks; None on the other ranks. Collective."""
    if world_size() == 1:
        return [value]
    values: list[T] | None = [value] * world_size() if this_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sums the ranks' tensors in place and returns the tensor. Collective."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x
