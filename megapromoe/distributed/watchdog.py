"""A watch over the ranks: a hang ends with a sentence that says which rank, where, and since when.

A rank that hangs (a stopped process, a dead node, a broken disk) leaves the others waiting in a collective, from where
they can say nothing. So each rank has a thread that tells the job's store where its rank is, and looks whether its own
rank gets anywhere. If not, it looks up who is furthest behind, prints that, and ends the process.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from datetime import timedelta

from torch.distributed import Store

from megapromoe.distributed import runtime

logger = logging.getLogger(__name__)

HUNG = 76  # exit code
ORDER = ("data", "forward and backward", "update", "log", "sample")  # of a step


class Watchdog:
    """Ends the process when its rank has been in one section of a step for longer than `limit` seconds."""

    def __init__(self, store: Store, rank: int, world: int, limit: float):
        """Starts watching at the first `at`. `store`: of the running job, shared by its `world` ranks."""
        self.store, self.rank, self.world, self.limit = store, rank, world, limit
        self.pulse = min(limit / 8, 30.0)
        self._where: tuple[int, str] | None = None
        self._beats = 0
        self._since = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def at(self, step: int, section: str) -> None:
        """This rank enters a section (of `ORDER`) of a step."""
        first, self._where, self._since = not self._beats, (step, section), time.monotonic()
        if first:  # the thread may never get to it: a rank can hang before the first pulse
            self._tell(self._where)

    def pause(self) -> None:
        """Nothing is expected of this rank until the next `at`."""
        self._where = None

    def close(self) -> None:
        """Stops watching."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self.pulse):
            where, stuck = self._where, time.monotonic() - self._since
            if where is None:
                continue
            self._tell(where)
            if stuck > self.limit:
                step, section = where
                runtime.end(
                    f"rank {self.rank}: no progress for {stuck:.0f} s (train.step_timeout = {self.limit:g}) in section"
                    f" '{section}' of step {step}; {self._verdict(where)}. Repeat the command to resume.",
                    HUNG,
                )

    def _tell(self, where: tuple[int, str]) -> None:
        self._beats += 1
        try:
            self.store.set(f"watchdog/{self.rank}", json.dumps([self._beats, *where]))
        except RuntimeError as error:
            logger.warning("rank %d: the job's store does not take a message: %s", self.rank, error)

    def _verdict(self, where: tuple[int, str]) -> str:
        """Who holds the job up. The first rank to ask finds out and tells the others, who stay audible meanwhile."""
        try:
            self.store.set_timeout(timedelta(seconds=max(self.pulse, 1.0)))
            if self.store.add("watchdog/judges", 1) == 1:
                before = self._heard()
                self._wait(3, where)
                self.store.set("watchdog/verdict", self._suspects(before, self._heard()))
            for _ in range(6):
                if self.store.check(["watchdog/verdict"]):
                    return self.store.get("watchdog/verdict").decode()
                self._wait(1, where)
            return "no rank could tell who holds the job up"
        except RuntimeError:
            return "the process that holds the job's store (the launcher's, or rank 0) does not answer"

    def _wait(self, pulses: int, where: tuple[int, str]) -> None:
        for _ in range(2 * pulses):
            time.sleep(self.pulse / 2)
            self._tell(where)

    def _suspects(self, before: dict[int, list], now: dict[int, list]) -> str:
        """Ranks whose threads have fallen silent, or else those that are furthest behind."""
        silent = [r for r in now if now[r] == before.get(r)]
        missing = sorted(set(range(self.world)) - set(now))
        named = silent
        if not (silent or missing):
            places = {r: (step, ORDER.index(section)) for r, (_, step, section) in now.items()}
            named = [r for r in places if places[r] == min(places.values())]
        said = [f"rank {r}, last in section '{now[r][2]}' of step {now[r][1]}" for r in named[:8]]
        said += [f"rank {r}, which never took a step" for r in missing[:8]]
        return f"{'silent' if silent or missing else 'furthest behind'}: {'; '.join(said)}"

    def _heard(self) -> dict[int, list]:
        """What every rank that has told anything told last: number, step, section."""
        there = [r for r in range(self.world) if self.store.check([f"watchdog/{r}"])]
        return {r: json.loads(self.store.get(f"watchdog/{r}")) for r in there}
