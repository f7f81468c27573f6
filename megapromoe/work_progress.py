"""How far long work is: a progress bar in a terminal, and elsewhere a plain line about once a minute.

    with Progress(50_000, "image", "samples.npz") as progress:
        for batch in batches:
            ...
            progress.update(len(batch))

In the log of a job that reads, some seconds after the start and then once a minute,

    samples.npz: 6,400 of 50,000 images (13 %), 112 images/s, 6 min left

and at the end `samples.npz: 50,000 images in 7 min, 115 images/s`. Work that ends before its first line is due logs
none. All commands use this class; training has a log of its own, with more figures in a line.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # imported where a bar is shown: help of a command needs none
    from tqdm import tqdm

logger = logging.getLogger(__name__)

FIRST = 5.0  # seconds from the start to the first line, which shows early whether the work is as fast as it should be
INTERVAL = 60.0  # seconds between lines
WINDOW = 5  # lines over which the rate is taken: start-up is soon forgotten, and one slow minute does not mislead

T = TypeVar("T")


class Progress:
    """Counts units of work that are done, and shows them.

    Args:
        total: units of the whole work; None where nobody knows.
        unit: the word for one of them, such as "image"; "B" for bytes, which are shown as KiB, MiB, ...
        title: what the work is, at the beginning of the bar and of each line.
        done: units that an earlier start has done; they count for no rate.
        enabled: False shows nothing, as on all ranks but one.
        terminal: show a bar, or else lines; None asks whether stderr is a terminal.
        leave: keep the bar on the screen at the end.
        left: seconds until all is done, None where unknown, for work whose units differ; without it, from the rate.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        title: str,
        *,
        done: int = 0,
        enabled: bool = True,
        terminal: bool | None = None,
        leave: bool = True,
        left: Callable[[], float | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.unit, self.title, self.done = total, unit, title, done
        self._clock, self._left = clock, left
        self._note, self._logged, self._closed = "", False, False
        self._start, self._done_before = clock(), done
        self._points = deque([(self._start, done)], maxlen=WINDOW + 1)
        self._next = self._start + FIRST
        self._bar: tqdm | None = None
        self._lines = enabled
        if enabled and (_is_terminal() if terminal is None else terminal):
            from tqdm import tqdm

            self._lines = False
            sizes: dict[str, Any] = {"unit_scale": True, "unit_divisor": 1024} if unit == "B" else {}
            shape: dict[str, Any] = {"initial": done, "dynamic_ncols": True, "smoothing": 0.05, "leave": leave}
            self._bar = tqdm(total=total, unit=unit, desc=title, **shape, **sizes)

    def update(self, count: int = 1) -> None:
        """Counts `count` more units as done."""
        self.done += count
        if self.total is not None and self.done > self.total:  # of an estimate that was too low
            self.total = self.done
            if self._bar is not None:
                self._bar.total = self.total
        if self._bar is not None:
            self._bar.update(count)
        self._log_if_due()

    def note(self, text: str) -> None:
        """Shows `text` behind the count from now on, such as which unit is in work; no more units are done."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        self._log_if_due()

    def write(self, line: str) -> None:
        """Prints a line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            _print(line)

    def close(self) -> None:
        """Ends the bar, or logs the last line if there were others. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._bar is not None:
            self._bar.close()
        elif self._logged:
            _log(self._last_line())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _log_if_due(self) -> None:
        now = self._clock()
        if self._lines and now >= self._next:
            _log(self._line(now))
            self._logged = True
            self._points.append((now, self.done))
            self._next = now + INTERVAL

    def _line(self, now: float) -> str:
        """What, how many of how many, rate, time left."""
        text = self._count(self.done)
        rate = None
        then, before = self._points[0]
        if self.done > before and now > then:
            rate = (self.done - before) / (now - then)
        if self.total is not None:
            share = f" ({self.done / self.total:.0%})".replace("%", " %") if self.total else ""
            text = f"{self._count(self.done, unit=self.unit == 'B')} of {self._count(self.total)}{share}"
        parts = [text]
        if rate is None:
            parts.append("rate unknown")
        else:
            parts.append(self._rate(rate))
        if self._left is not None:
            left = self._left()
            parts.append("time left unknown" if left is None else f"{duration(left)} left")
        elif rate is not None and self.total is not None:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        line = f"{self.title}: {', '.join(parts)}"
        return f"{line}; {self._note}" if self._note else line

    def _last_line(self) -> str:
        seconds, count = self._clock() - self._start, self.done - self._done_before
        rate = f", {self._rate(count / seconds)}" if seconds > 0 and count else ""
        if self.total is not None and self.done < self.total:
            rest = f"of {self._count(self.total)}"
            done = self._count(self.done, unit=self.unit == "B")
            return f"{self.title}: ended at {done} {rest} after {duration(seconds)}{rate}"
        return f"{self.title}: {self._count(self.done)} in {duration(seconds)}{rate}"

    def _count(self, count: float, unit: bool = True) -> str:
        if self.unit == "B":
            return size(count)
        return f"{count:,} {plural(self.unit, count)}" if unit else f"{count:,}"

    def _rate(self, rate: float) -> str:
        """Units a second, a minute or an hour, whichever is 1 or more."""
        if self.unit == "B":
            return f"{size(rate)}/s"
        span, name = next(((s, n) for s, n in ((1, "s"), (60, "min")) if rate * s >= 1), (3600, "h"))
        value = rate * span
        return f"{f'{value:,.0f}' if value >= 100 else f'{value:.3g}'} {plural(self.unit, 2)}/{name}"


def track(items: Iterable[T], unit: str, title: str, **options: Any) -> Iterator[T]:
    """Yields the items, and shows how many are done; `options` are those of `Progress`."""
    with Progress(len(items) if isinstance(items, Sized) else None, unit, title, **options) as progress:
        for item in items:
            yield item
            progress.update()


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def plural(word: str, count: float) -> str:
    """A word for so many things."""
    if count == 1:
        return word
    return f"{word}es" if word.endswith(("ch", "s")) else f"{word}s"


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


def _log(line: str) -> None:
    """Into the log of the command, or to stderr for one that keeps none."""
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info("%s", line)
    else:
        _print(line)


def _print(line: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # a log that cannot be written ends no work
            print(line, file=sys.stderr, flush=True)
