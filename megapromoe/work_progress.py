"""Progress of long work: a progress bar in a terminal, otherwise a log line about once a minute.

    with Progress(50_000, "image", "samples.npz") as progress:
        for batch in batches:
            ...
            progress.update(len(batch))

The log of a job then has, some seconds after the start and then once a minute,

    samples.npz: 6,400 of 50,000 images (13 %), 112 images/s, 6 min left

and at the end `samples.npz: 50,000 images in 7 min, 115 images/s`. Work that ends before the first line is due logs
nothing. All commands use this class except training, whose log lines contain more values.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # imported only if a bar is shown, so that --help is fast
    from tqdm import tqdm

logger = logging.getLogger(__name__)

FIRST = 5.0  # seconds from the start to the first line, which shows early whether the speed is as expected
INTERVAL = 60.0  # seconds between lines
WINDOW = 5  # lines over which the rate is averaged: start-up soon has no effect, a slow minute a small one

T = TypeVar("T")


class Progress:
    """Counts completed units of work and reports the progress.

    Args:
        total: number of units; None if unknown.
        unit: singular name of a unit, such as "image"; "B" for bytes, which are shown as KiB, MiB, ...
        title: name of the work, at the beginning of the bar and of each line.
        done: units that an earlier start has completed; they do not count for the rate.
        enabled: False shows nothing; for all ranks except one.
        terminal: True shows a bar, False log lines; None: a bar if stderr is a terminal.
        leave: keep the bar on the screen at the end.
        left: returns the seconds that are left, or None if unknown; for units of different cost. Without it, it is
            estimated from the rate.
        clock: monotonic clock, seconds.
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
        """Counts `count` more units as completed."""
        self.done += count
        if self.total is not None and self.done > self.total:  # `total` was an estimate and too low
            self.total = self.done
            if self._bar is not None:
                self._bar.total = self.total
        if self._bar is not None:
            self._bar.update(count)
        self._log_if_due()

    def note(self, text: str) -> None:
        """Shows `text` behind the count from now on, such as the name of the current unit."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        self._log_if_due()

    def write(self, line: str) -> None:
        """Prints a separate line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            _print(line)

    def close(self) -> None:
        """Closes the bar, or logs the last line if there were others. Can be called twice."""
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
        """A progress line: title, count, total, rate and time left."""
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
        """Units per second, minute or hour: the shortest for which it is at least 1, else per hour."""
        if self.unit == "B":
            return f"{size(rate)}/s"
        span, name = next(((s, n) for s, n in ((1, "s"), (60, "min")) if rate * s >= 1), (3600, "h"))
        value = rate * span
        return f"{f'{value:,.0f}' if value >= 100 else f'{value:.3g}'} {plural(self.unit, 2)}/{name}"


def track(items: Iterable[T], unit: str, title: str, **options: Any) -> Iterator[T]:
    """Yields the items and reports how many are completed. `options` are those of `Progress`."""
    with Progress(len(items) if isinstance(items, Sized) else None, unit, title, **options) as progress:
        for item in items:
            yield item
            progress.update()


def duration(seconds: float) -> str:
    """A duration in seconds as text: "90 s", "12 min", "3.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def size(count: float) -> str:
    """A number of bytes as text: "512 B", "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def plural(word: str, count: float) -> str:
    """The singular or plural of `word` for a count."""
    if count == 1:
        return word
    return f"{word}es" if word.endswith(("ch", "s")) else f"{word}s"


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


def _log(line: str) -> None:
    """Logs a line, or prints it on stderr if no logging is configured."""
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info("%s", line)
    else:
        _print(line)


def _print(line: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # an output that cannot be written must not end the work
            print(line, file=sys.stderr, flush=True)
