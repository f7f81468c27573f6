"""A watch over a preflight: a check that hangs ends, with the ranks that hold it up.

Every rank has a thread that tells the store where the rank is. Rank 0's looks whether anything moves.
"""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import Store

from megapromoe.distributed import runtime
from megapromoe.preflight.verdict import Hang


class Watch:
    """Watches one rank; on rank 0, all of them.

    Args:
        store: a connection of its own, for the rank's may be waiting.
        limit: seconds in which some rank must get on.
        on_hang: called on rank 0, in the watch's thread, with what hangs; returns the exit code for all ranks.
    """

    def __init__(self, store: Store, rank: int, world: int, limit: float, on_hang: Callable[[Hang], int]):
        self.store, self.rank, self.world, self.limit, self.on_hang = store, rank, world, limit, on_hang
        self.pulse = min(limit / 10, 1.0)
        self._beats, self._place = 0, (0, "arrival")
        self._lock = threading.Lock()
        self._over = threading.Event()
        store.set_timeout(timedelta(seconds=max(limit, 10.0)))
        self._tell()
        self._thread = threading.Thread(target=self._watch, name="preflight watch", daemon=True)
        self._thread.start()

    def at(self, stage: str) -> None:
        """This rank comes to the next stage; all ranks go through the same ones."""
        self._place = (self._place[0] + 1, stage)
        self._tell()  # at once: it may be the last word

    def close(self) -> None:
        """Stops watching."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            self._all_ranks() if self.rank == 0 else self._own_rank()
        except RuntimeError as error:
            if not self._over.is_set():
                said = str(error).splitlines()[0]
                runtime.end(f"rank {self.rank}: the holder of the job's store does not answer ({said})", 1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _own_rank(self) -> None:
        while not self._over.wait(self.pulse):
            self._tell()
            if self.store.check(["hung"]):
                os._exit(int(self.store.get("hung")))

    def _all_ranks(self) -> None:
        heard: dict[int, list] = {}
        changed: dict[int, float] = {}
        moved = time.monotonic()
        while not self._over.wait(self.pulse):
            self._tell()
            time_now, before, heard = time.monotonic(), heard, self._heard()
            for rank, (beats, number, _) in heard.items():
                last = before.get(rank)
                if last is None or last[0] != beats:
                    changed[rank] = time_now
                if last is None or last[1] != number:
                    moved = time_now
            if time_now - moved > self.limit:
                code = self.on_hang(self._hang(heard, changed, time_now))
                self.store.set("hung", str(code))
                time.sleep(3 * self.pulse)  # the others look once a pulse, and the store ends with this process
                os._exit(code)

    def _hang(self, heard: dict[int, list], changed: dict[int, float], time_now: float) -> Hang:
        silent = [r for r in range(self.world) if r not in heard or time_now - changed[r] > self.limit / 2]
        first = min(number for _, number, _ in heard.values())
        behind = [r for r, (_, number, _) in heard.items() if number == first]
        late = [r for r in silent if r in heard] or behind
        return Hang(heard[late[0]][2], tuple(silent), tuple(behind))

    def _heard(self) -> dict[int, list]:
        there = [r for r in range(self.world) if self.store.check([f"beat/{r}"])]
        return {r: json.loads(self.store.get(f"beat/{r}")) for r in there}

    def _tell(self) -> None:
        with self._lock:
            self._beats += 1
            self.store.set(f"beat/{self.rank}", json.dumps([self._beats, *self._place]))
