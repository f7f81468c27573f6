"""What the ranks of a job do together outside the model: join it, agree on errors and values, gather, add up.

In a process that has joined no job, all of it is what one rank does.
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

STEP_TIMEOUT = 300.0  # seconds, where no run's config says it
POLL = 0.2  # seconds between two looks at how many ranks have finished
LAST_LOOK = 10.0  # seconds that rank 0 keeps the store for the others, once all have finished


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
        runtime.enable_flight_records(records)
    # Alone, nothing tells how long anything but a step may take. Together, a hang is to be named before a collective
    # gives up, which names nobody.
    longest = math.inf if launch.world == 1 else max(timeout - watchdog.verdict_time(step_timeout), timeout / 2)
    with met_ranks(launch, timeout, step_timeout, "train.step_timeout", longest, records) as ranks:
        watchdog.starting("joining torch.distributed")
        job = runtime.start(launch, timeout, ranks.store)
        try:
            yield job
        except Exception as error:
            if getattr(error, "on_all_ranks", False):  # otherwise others may wait in a collective, and so would `stop`
                watchdog.at(LEAVING)
                runtime.stop()
            elif not isinstance(error, UserError):
                ranks.watchdog.await_verdict(error)
            raise
        watchdog.at(LEAVING)
        runtime.stop()


@dataclass(frozen=True)
class MetRanks:
    """Ranks that have met in the job's store, and watch each other; they need no process group."""

    store: dist.Store
    channel: StoreChannel
    watchdog: Watchdog

    def wait_for_all(self) -> None:
        """Returns once every rank has called it. The watchdog limits the wait. Collective."""
        watchdog.at("waiting for the other ranks")
        # Where the store does not answer, the watchdog ends this process after its limit, with a sentence.
        with suppress(StoreUnreachable):
            self.channel.count("finished")
        while not self._all_counted("finished"):
            time.sleep(POLL)
        with suppress(StoreUnreachable):
            self.channel.count("left")
        deadline = time.monotonic() + LAST_LOOK
        while self.channel.rank == 0 and not self._all_counted("left") and time.monotonic() < deadline:
            time.sleep(POLL)  # rank 0 may hold the store, which the others still ask

    def _all_counted(self, name: str) -> bool:
        with suppress(StoreUnreachable):
            return self.channel.count(name, 0) >= self.channel.world
        return False


@contextmanager
def met_ranks(
    launch: runtime.Launch,
    timeout: float,
    step_timeout: float,
    limit_name: str,
    longest: float = math.inf,
    records: Path | None = None,
) -> Iterator[MetRanks]:
    """Meets the ranks of `launch`, under one watchdog until the end of the block. Collective.

    Args:
        timeout: seconds to wait for the other ranks.
        step_timeout: seconds without progress that are a hang; in the start-up at least half of `timeout`, alone any.
        limit_name: the option that sets `step_timeout`, for the message.
        longest, records: see `Watchdog`.
    """
    if launch.world == 1:
        store: dist.Store = dist.HashStore()
        connection = store
    else:
        store = rendezvous.gather(launch, timeout)
        connection = rendezvous.own_connection(store, min(timeout, 30.0))
    channel = StoreChannel(connection, launch.rank, launch.world, min(step_timeout, 30.0), timeout)
    extra = math.inf if launch.world == 1 else max(timeout / 2 - step_timeout, 0.0)
    dog = Watchdog(channel, step_timeout, limit_name, start_extra=extra, longest=longest, flight_records=records)
    with closing(channel), watchdog.watching(dog):
        yield MetRanks(store, channel, dog)


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
