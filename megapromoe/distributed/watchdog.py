"""Hang detection: a hang ends the job with a message that names the rank, its place in the program, and the duration.

If a rank hangs (a stopped process, a dead node, a broken disk), the others wait for it in a collective. So each rank
has a watchdog thread that reports to the job's store where its rank is and for how long. A job hangs when no rank that
still reports has made progress for `limit` seconds. The first watchdog that finds this reads all reports, determines
the ranks that block the job, and puts the verdict into the store. Every rank prints the verdict with the stacks of its
threads, and ends its process.

A watchdog runs from the rendezvous of the job to its end. The code of the job marks its places with this module's
`at`, `touch`, `starting` and `pause`, which have no effect without a watchdog.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from megapromoe.distributed import process_end
from megapromoe.distributed.launch_environment import StoreUnreachable
from megapromoe.distributed.store_channel import StoreChannel

logger = logging.getLogger(__name__)

HUNG = 76  # exit code
SILENT_AFTER = 3  # heartbeats without a report after which a rank counts as silent
GIVE_UP_AFTER = 8  # heartbeats without a verdict after which a rank ends without one
COMPILING = 1800.0  # additional seconds for a step that compiles the model
LEAVING = "leaving the job"
START_UP = "start-up"


@dataclass(frozen=True)
class Hang:
    """A hang of the job and the ranks that cause it.

    Attributes:
        place: last reported place of the first rank that blocks the job.
        silent: ranks that have stopped reporting, or never reported.
        behind: of the reporting ranks, those that are furthest behind.
        places: rank -> last reported place, for every rank that has reported.
    """

    place: str
    silent: tuple[int, ...]
    behind: tuple[int, ...]
    places: Mapping[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        ranks = self.silent or self.behind
        last = [f"rank {rank}, last in {self.places[rank]}" for rank in ranks[:8] if rank in self.places]
        never = [f"rank {rank}, which never reported" for rank in ranks[:8] if rank not in self.places]
        return f"{'silent' if self.silent else 'furthest behind'}: {'; '.join(last + never)}"


@dataclass(frozen=True)
class _Report:
    """The last report of a rank.

    Attributes:
        number: number of this report.
        position: number of the current place.
        place: name of the current place.
        idle: seconds without progress.
    """

    number: int
    position: int
    place: str
    idle: float


class Watchdog:
    """Watches this rank and, together with the watchdogs of the other ranks, the job.

    Args:
        channel: messages of the job, over a connection of its own: that of the rank may be blocked.
        limit: seconds without progress of any rank that count as a hang.
        limit_name: the option that sets `limit`, for messages.
        on_hang: called on the rank that detects the hang first (rank 0 if it still runs), in the watchdog's thread.
            Returns the message that all ranks print, and their exit code.
        every_place: report each place at once, for one message to the store; otherwise once per heartbeat.
        start_extra: additional seconds for each place of the start-up: see `starting`.
        code: exit code if no rank can determine the cause.
        longest: seconds after which every place is a hang, whatever additional time it has. It must be below the
            time-out of collectives, whose errors name no rank.
        flight_records: folder for NCCL's flight record of a hang.
    """

    def __init__(
        self,
        channel: StoreChannel,
        limit: float,
        limit_name: str,
        on_hang: Callable[[Hang], tuple[str, int]] = lambda hang: (f"{hang}. Repeat the command to resume.", HUNG),
        every_place: bool = False,
        start_extra: float = 0.0,
        code: int = HUNG,
        longest: float = math.inf,
        flight_records: Path | None = None,
    ):
        self.channel, self.limit, self.limit_name, self.on_hang = channel, limit, limit_name, on_hang
        self.every_place, self.start_extra, self.code = every_place, start_extra, code
        self.longest, self.flight_records = longest, flight_records
        self.heartbeat = heartbeat_interval(limit)
        self._place, self._position, self._since, self._extra = "", 0, time.monotonic(), 0.0
        self._paused = True
        self._reports = 0
        self._warned = False
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def at(self, place: str, extra: float = 0.0) -> None:
        """Marks the next place of this rank. All ranks pass the same places in the same order.

        Args:
            place: name of the place, for messages.
            extra: seconds that this place may take beyond `limit`; the sum is limited to `longest`.
        """
        starts = not self._reports or self._place.startswith(START_UP)
        self._extra = min(extra, max(self.longest - self.limit, 0.0))
        self._place, self._position, self._since = place, self._position + 1, time.monotonic()
        self._paused = False
        if self.every_place or starts:  # report at once: a rank can hang before the first heartbeat
            with contextlib.suppress(StoreUnreachable):  # logged; the thread ends the process if this rank stops
                self._report()

    def touch(self) -> None:
        """Reports progress within the current place. The ranks may call it a different number of times."""
        self._since = time.monotonic()

    def pause(self) -> None:
        """Expects no progress of this rank until the next `at`. The job does not hang while any rank pauses."""
        self._paused = True

    def await_verdict(self, error: Exception) -> None:
        """Waits for the verdict on a hang before the error of a collective is raised.

        When a hang ends the ranks one after the other, connections close, and the collectives of the remaining ranks
        fail. If this rank has made no progress for `limit` seconds, the error's traceback is printed, which shows where
        the rank waited, and this rank waits until its watchdog ends it with the verdict.
        """
        if not self._paused and self._idle() > self.limit:
            traceback.print_exception(error)
            self._closed.wait(GIVE_UP_AFTER * self.heartbeat + self.channel.timeout)

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        self._thread.join(timeout=min(2 * self.heartbeat, 5.0))  # with a limit: it may wait for the store

    def _watch(self) -> None:
        waiting_since, attempt = None, 0
        while not self._closed.wait(self.heartbeat):
            if not self._reports:
                continue
            try:
                self._report()
                if (verdict := self.channel.receive_if_sent("watchdog/verdict")) is not None:
                    self._end_with_verdict(*verdict)
                if self._paused or self._idle() <= self._limit_of_this_rank():
                    waiting_since = None
                    continue
                attempts = self.channel.count("watchdog/attempts", 0)
                if waiting_since is None or attempts > attempt:
                    waiting_since, attempt = time.monotonic(), attempts
                if self.channel.count(f"watchdog/evaluate/{attempt}") == 1:
                    self._evaluate()
                elif time.monotonic() - waiting_since > GIVE_UP_AFTER * self.heartbeat:
                    self._end("the rank that blocks the job could not be determined", self.code)
            except StoreUnreachable as error:
                if self._idle() > self.limit and not self._paused and not self._closed.is_set():
                    self._end(str(error), self.code)
            except Exception:
                if not self._closed.is_set():
                    traceback.print_exc()
                    process_end.hard_exit(f"rank {self.channel.rank}: its watchdog failed", 1)

    def _limit_of_this_rank(self) -> float:
        """Seconds without progress after which this rank evaluates the job.

        Rank 0 comes first, because its `on_hang` may have the most information; the others follow if it does not.
        """
        return self.limit if self.channel.rank == 0 else self.limit + 1.5 * self.heartbeat

    def _idle(self) -> float:
        """Seconds without progress, minus the additional seconds of this place."""
        return max(time.monotonic() - self._since - self._extra, 0.0)

    def _report(self) -> None:
        with self._sending:
            self._reports += 1
            idle = 0.0 if self._paused else self._idle()
            try:
                self.channel.send(f"watchdog/{self.channel.rank}", [self._reports, self._position, self._place, idle])
            except StoreUnreachable as error:
                if not self._warned and self._place != LEAVING:  # at the end, rank 0 may have closed the store
                    logger.warning("rank %d: %s", self.channel.rank, error)
                self._warned = True
                raise

    def _evaluate(self) -> None:
        """Determines whether the job hangs; if so, publishes the verdict and ends this process."""
        before = self._read()
        for _ in range(2 * SILENT_AFTER):
            if self._closed.wait(self.heartbeat / 2):
                return
            self._report()
        hang = find_hang(before, self._read(), self.channel.world, self.limit)
        if hang is None or self._idle() <= self.limit or self._paused:
            self.channel.count("watchdog/attempts")  # a rank makes progress: allow the next evaluation
            return
        sentence, code = self.on_hang(hang)
        self.channel.send("watchdog/verdict", [sentence, code])
        self._end_with_verdict(sentence, code)

    def _read(self) -> dict[int, _Report]:
        reports = self.channel.receive_from_ranks("watchdog")
        return {rank: _Report(*report) for rank, report in reports.items()}

    def _end_with_verdict(self, sentence: str, code: int) -> None:
        """Ends this process a little after it printed its stacks.

        The ranks read a verdict once per heartbeat. All print their stacks before the first one ends, because its
        closed connections raise errors in their collectives, and the stacks then no longer show where they waited.
        Rank 0 is the last to end: it may hold the store, for which others may wait.
        """
        self._end(sentence, code, linger=(2.5 if self.channel.rank == 0 else 1.0) * self.heartbeat)

    def _end(self, sentence: str, code: int, linger: float = 0.0) -> None:
        limit = f"{self.limit_name} = {self.limit:g}" + (
            f", {self._extra:g} s more for this place" if self._extra else ""
        )
        stopped = f"no progress for {time.monotonic() - self._since:.0f} s ({limit}) in {self._place}"
        message = f"rank {self.channel.rank}: {stopped}; {sentence}"
        process_end.hard_exit(message, code, self.flight_records, linger)


def heartbeat_interval(limit: float) -> float:
    """Seconds between two reports of a watchdog with the given limit."""
    return min(limit / 8, 30.0)


def verdict_time(limit: float) -> float:
    """The maximum number of seconds from reaching a watchdog's limit to the end of all ranks."""
    return 9 * heartbeat_interval(limit)


_watching: ContextVar[tuple[Watchdog, ...]] = ContextVar("watching", default=())  # of the job of this thread


@contextlib.contextmanager
def watched_by(watchdog: Watchdog) -> Iterator[None]:
    """Uses a watchdog for this process during the block, and closes it at the end."""
    before = _watching.set((*_watching.get(), watchdog))
    try:
        yield
    finally:
        _watching.reset(before)
        watchdog.close()


def at(place: str, extra: float = 0.0) -> None:
    """See `Watchdog.at`."""
    for watchdog in _watching.get():
        watchdog.at(place, extra)


def starting(place: str, extra: float = 0.0) -> None:
    """As `at`, for a place before the first step, which may take `Watchdog.start_extra` seconds longer."""
    for watchdog in _watching.get():
        watchdog.at(f"{START_UP}: {place}", watchdog.start_extra + extra)


def touch() -> None:
    """See `Watchdog.touch`."""
    for watchdog in _watching.get():
        watchdog.touch()


def pause() -> None:
    """See `Watchdog.pause`."""
    for watchdog in _watching.get():
        watchdog.pause()


def find_hang(before: Mapping[int, _Report], now: Mapping[int, _Report], world: int, limit: float) -> Hang | None:
    """Determines the ranks that block a job, from two readings of all reports; None if a rank makes progress.

    Args:
        before, now: rank -> report, of the first and the second reading.
        world: number of ranks.
        limit: seconds without progress that count as a hang.

    A rank without a new report between the readings is silent. If all ranks report, those furthest behind are named.
    """
    silent = [rank for rank in range(world) if rank not in now or now[rank] == before.get(rank)]
    live = [rank for rank in range(world) if rank not in silent]
    if any(now[rank].idle <= limit for rank in live):
        return None
    first = min((now[rank].position for rank in live), default=0)
    behind = [rank for rank in live if now[rank].position == first]
    places = {rank: report.place for rank, report in now.items()}
    known = [rank for rank in silent if rank in now] or behind
    return Hang(places[known[0]] if known else "start-up", tuple(silent), tuple(behind), places)
