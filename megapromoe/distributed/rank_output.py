"""Standard output and standard error of a rank that survive a closed pipe, a lost terminal and a full disk.

Training continues if its terminal is closed or its `tee` is killed. An exception in a print on one rank would otherwise
leave the other ranks waiting in a collective.
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
    """A text stream that drops output that cannot be written. Other attributes are those of the wrapped stream."""

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

    def final_flush(self) -> None:
        """Flushes for the last time and drops what cannot be written; Python's own flush at exit would fail on it."""
        try:
            self._stream.flush()
        except OSError:
            self._redirect()

    def _drop(self, error: OSError) -> None:
        """Redirects to /dev/null after a closed pipe or terminal, which is permanent; a full disk may recover."""
        if error.errno in (errno.EPIPE, errno.EIO):
            self._redirect()

    def _redirect(self) -> None:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def ignoring_output_errors() -> Iterator[None]:
    """Replaces standard output and standard error by `RankOutput`s during the block."""
    before = sys.stdout, sys.stderr
    outputs = [stream and RankOutput(stream) for stream in before]  # a stream is None in a process without it
    sys.stdout, sys.stderr = cast(list[TextIO], outputs)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for output in filter(None, outputs):
            output.final_flush()
