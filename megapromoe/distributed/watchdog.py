"""A watch over the ranks of a job: a hang ends with a sentence that names the rank, where it is, and since when.

A rank that hangs (a stopped process, a dead node, a broken disk) leaves the others waiting in a collective, where they
can report nothing. So each rank has a thread that reports to the job's store where its rank is and for how long. A job
hangs when no rank that still reports has moved for `limit` seconds. The first rank that sees this reads all reports,
names the ranks that hold up the job, and leaves the verdict in the store; every rank prints it, with the stacks of its
threads, and ends its process.

One watchdog watches a process from the moment its job has met until it leaves. Whatever runs meanwhile says where it
is by this module's `at`, `touch`, `starting` and `pause`, which do nothing where nobody watches.
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
SILENT_AFTER = 3  # pulses without a report after which a rank counts as silent
GIVE_UP_AFTER = 8  # pulses without a verdict after which a rank ends without one
COMPILING = 1800.0  # more seconds that a step may take which compiles the model
LEAVING = "leaving the job"
START_UP = "start-up"


@dataclass(frozen=True)
class Hang:
    """A job that came to a stop.

    Attributes:
        place: where the rank to blame was last, or the first of them.
        silent: ranks that report nothing any more, or never did.
        behind: of the others, those that are furthest behind.
        places: rank -> where it was last, of all ranks that ever reported.
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
    """What a rank last reported: how many reports before, how many places before, where it is, for how many seconds."""

    number: int
    position: int
    place: str
    idle: float


class Watchdog:
    """Watches this rank, and with the other ranks' watchdogs the job.

    Args:
        channel: of the job, with a connection of its own: the rank's may be waiting.
        limit: seconds without progress of any rank that are a hang.
        limit_name: the option that sets `limit`, for the message.
        on_hang: called on the rank that sees the hang first (rank 0 if it can), in the watchdog's thread; returns
            what all ranks print, and the exit code of all.
        every_place: report each place at once, which costs a message to the store; otherwise once a pulse.
        start_extra: more seconds that each place of the start-up may take: see `starting`.
        longest: seconds after which any place is a hang, whatever more it may take. Where ranks wait for each other in
            collectives, these fail after some time and name nobody: a hang must be named before.
        flight_records: folder for NCCL's flight record of a hang.
        code: exit code where no rank can judge any more.
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
        self.pulse = pulse_of(limit)
        self._place, self._position, self._since, self._extra = "", 0, time.monotonic(), 0.0
        self._paused = True
        self._reports = 0
        self._warned = False
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def at(self, place: str, extra: float = 0.0) -> None:
        """This rank comes to the next place; all ranks come to the same ones in the same order.

        Args:
            extra: seconds that this place may take beyond `limit`, `longest` in all at most.
        """
        starts = not self._reports or self._place.startswith(START_UP)
        self._extra = min(extra, max(self.longest - self.limit, 0.0))
        self._place, self._position, self._since = place, self._position + 1, time.monotonic()
        self._paused = False
        if self.every_place or starts:  # a rank can hang before its thread's next pulse, in its first step
            with contextlib.suppress(StoreUnreachable):  # logged; the thread ends the process when this rank stops
                self._report()

    def touch(self) -> None:
        """This rank moves on within its place; others may do so more often or not at all."""
        self._since = time.monotonic()

    def pause(self) -> None:
        """Nothing is expected of this rank until the next `at`; while any rank pauses, the job does not hang."""
        self._paused = True

    def await_verdict(self, error: Exception) -> None:
        """For a rank whose collective has failed: in a hang, others may have ended already, which closes connections.

        If nothing has moved for `limit` seconds, the error's traceback, which tells where this rank waited, is printed,
        and the rank is given the time to end with the verdict like the others.
        """
        if not self._paused and self._idle() > self.limit:
            traceback.print_exception(error)
            self._closed.wait(GIVE_UP_AFTER * self.pulse + self.channel.timeout)

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        self._thread.join(timeout=min(2 * self.pulse, 5.0))  # a call of the store may be waiting

    def _watch(self) -> None:
        waiting_since, attempt = None, 0
        while not self._closed.wait(self.pulse):
            if not self._reports:
                continue
            try:
                self._report()
                if (verdict := self.channel.receive_if_sent("watchdog/verdict")) is not None:
                    self._end(*verdict)
                if self._paused or self._idle() <= self._limit_here():
                    waiting_since = None
                    continue
                attempts = self.channel.count("watchdog/attempts", 0)
                if waiting_since is None or attempts > attempt:
                    waiting_since, attempt = time.monotonic(), attempts
                if self.channel.count(f"watchdog/judge/{attempt}") == 1:
                    self._judge()
                elif time.monotonic() - waiting_since > GIVE_UP_AFTER * self.pulse:
                    self._end("no rank could tell who holds the job up", self.code)
            except StoreUnreachable as error:
                if self._idle() > self.limit and not self._paused and not self._closed.is_set():
                    self._end(str(error), self.code)
            except Exception:
                if not self._closed.is_set():
                    traceback.print_exc()
                    process_end.end(f"rank {self.channel.rank}: its watchdog failed", 1)

    def _limit_here(self) -> float:
        """Rank 0 looks first, since `on_hang` may know most there; the others once it should have."""
        return self.limit if self.channel.rank == 0 else self.limit + 1.5 * self.pulse

    def _idle(self) -> float:
        """Seconds without progress, less what this place may take beyond the limit."""
        return max(time.monotonic() - self._since - self._extra, 0.0)

    def _report(self) -> None:
        with self._sending:
            self._reports += 1
            idle = 0.0 if self._paused else self._idle()
            try:
                self.channel.send(f"watchdog/{self.channel.rank}", [self._reports, self._position, self._place, idle])
            except StoreUnreachable as error:
                if not self._warned and self._place != LEAVING:  # rank 0 may have left with the store
                    logger.warning("rank %d: %s", self.channel.rank, error)
                self._warned = True
                raise

    def _judge(self) -> None:
        """Decides whether the job hangs; if so, leaves the verdict for all and ends this process."""
        before = self._read()
        for _ in range(2 * SILENT_AFTER):
            if self._closed.wait(self.pulse / 2):
                return
            self._report()
        hang = find_hang(before, self._read(), self.channel.world, self.limit)
        if hang is None or self._idle() <= self.limit or self._paused:
            self.channel.count("watchdog/attempts")  # some rank moves: the next look is open again
            return
        sentence, code = self.on_hang(hang)
        self.channel.send("watchdog/verdict", [sentence, code])
        time.sleep(1.5 * self.pulse)  # the others look once a pulse, and the store may end with this process
        self._end(sentence, code)

    def _read(self) -> dict[int, _Report]:
        reports = self.channel.receive_from_ranks("watchdog")
        return {rank: _Report(*report) for rank, report in reports.items()}

    def _end(self, sentence: str, code: int) -> None:
        limit = f"{self.limit_name} = {self.limit:g}" + (f", {self._extra:g} s more for this" if self._extra else "")
        stopped = f"no progress for {time.monotonic() - self._since:.0f} s ({limit}) in {self._place}"
        process_end.end(f"rank {self.channel.rank}: {stopped}; {sentence}", code, self.flight_records)


def pulse_of(limit: float) -> float:
    """Seconds between two reports of a watchdog with this limit."""
    return min(limit / 8, 30.0)


def verdict_time(limit: float) -> float:
    """Seconds that pass between a watchdog's limit and the end of every rank, at most."""
    return 6 * pulse_of(limit)


_watching: ContextVar[tuple[Watchdog, ...]] = ContextVar("watching", default=())  # of this thread's job


@contextlib.contextmanager
def watching(dog: Watchdog) -> Iterator[None]:
    """Makes a watchdog that of this process until the end of the block, and closes it then."""
    before = _watching.set((*_watching.get(), dog))
    try:
        yield
    finally:
        _watching.reset(before)
        dog.close()


def at(place: str, extra: float = 0.0) -> None:
    """See `Watchdog.at`."""
    for dog in _watching.get():
        dog.at(place, extra)


def starting(place: str, extra: float = 0.0) -> None:
    """As `at`, of a place before the first step, which may take `start_extra` of the watchdog longer."""
    for dog in _watching.get():
        dog.at(f"{START_UP}: {place}", dog.start_extra + extra)


def touch() -> None:
    """See `Watchdog.touch`."""
    for dog in _watching.get():
        dog.touch()


def pause() -> None:
    """See `Watchdog.pause`."""
    for dog in _watching.get():
        dog.pause()


def find_hang(before: Mapping[int, _Report], now: Mapping[int, _Report], world: int, limit: float) -> Hang | None:
    """Which ranks hold up a job, from two readings of all reports; None if some rank still moves.

    A rank without a new report between the readings is silent. Where all report, those furthest behind are named.
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
