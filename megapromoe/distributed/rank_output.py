"""Standard output and errors of a rank: that nobody reads them, or that their disk is full, does not end it.

A training whose terminal is gone, or whose `tee` was killed, trains on. An error there on one rank of a job would leave
the other ranks waiting.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


class RankOutput:
    """A stream that drops what cannot be written. Everything else is the stream's own."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def finish(self) -> None:
        """Flushes for the last time. What cannot be written is dropped: the end of Python would fail by it."""
        try:
            self._stream.flush()
        except OSError:
            self._redirect()

    def _drop(self, error: OSError) -> None:
        """A reader or a terminal that is gone does not come back; a full disk may have room again."""
        if error.errno in (errno.EPIPE, errno.EIO):
            self._redirect()

    def _redirect(self) -> None:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Standard output and errors of the block are `RankOutput`s."""
    before = sys.stdout, sys.stderr
    outputs = [stream and RankOutput(stream) for stream in before]  # None where a program has none
    sys.stdout, sys.stderr = cast(list[TextIO], outputs)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for output in filter(None, outputs):
            output.finish()
