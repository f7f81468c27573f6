"""Log files of a run that tolerate a full disk and a run directory that is temporarily renamed or removed.

Records that cannot be written are kept in memory and written later. Training continues meanwhile: a log never raises
OSError. Each log warns once when it cannot be written, and again when it can.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from megapromoe.diffusion.image_grid import write_png
from megapromoe.io import open_regular

logger = logging.getLogger(__name__)

MAX_PENDING = 64 << 20  # bytes that a log keeps in memory while it cannot be written

Record = TypeVar("Record")


class LogFolder:
    """The run directory that logs are written to. Checks that its path still leads to the same directory.

    If a run directory is removed while its run continues, another run may use the path, and the logs of both must not
    be mixed. A directory that was copied or mounted again is recognised by its environment.json, which contains each
    start with its time and process.
    """

    def __init__(self, path: Path):
        """Raises OSError if there is no such folder."""
        self.path = Path(path)
        self._handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)  # while it is open, its inode is not reused
        self._starts = self._read_starts()

    def check(self) -> None:
        """Raises OSError unless the path still leads to the folder of the start."""
        if os.path.samestat(os.stat(self.path), os.fstat(self._handle)):
            return
        if self._starts is None or self._read_starts() != self._starts:
            raise OSError(errno.ESTALE, "this path now leads to the folder of another run", str(self.path))
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        os.close(self._handle)
        self._handle = handle

    def close(self) -> None:
        """Closes the folder. Do not call `check` afterwards."""
        os.close(self._handle)

    def _read_starts(self) -> bytes | None:
        try:
            return (self.path / "environment.json").read_bytes()
        except FileNotFoundError:
            return None


class Log(ABC, Generic[Record]):
    """Writes records in order. Records that cannot be written are retried with the next one.

    Args:
        path: the file or folder to write, below `folder`.
        folder: the run directory.
    """

    def __init__(self, path: Path, folder: LogFolder):
        self.path, self.folder = path, folder
        self._pending: list[Record] = []
        self._lost = 0
        self._fails = False

    def write(self, record: Record) -> None:
        """Writes the pending records and this one. If more than `MAX_PENDING` bytes are pending, drops it."""
        self._pending.append(record)
        self.flush()
        if sum(map(self._size_of, self._pending)) > MAX_PENDING:
            self._pending.pop()
            self._lost += 1

    def flush(self) -> None:
        """Tries to write the pending records."""
        if not self._is_due():
            return
        count = len(self._pending)
        try:
            self.folder.check()
            self.path.parent.mkdir(exist_ok=True)
            self._write_pending()
        except OSError as error:
            if not self._fails:
                logger.warning(
                    "%s: cannot be written (%s); training continues, and log entries are kept in memory",
                    *(error.filename or self.path, error.strerror or error),
                )
            self._fails = True
            return
        if self._fails:
            lost = f", but {self._lost} entries were dropped, since too many were pending" if self._lost else ""
            logger.warning("%s: can be written again; wrote the %d entries that were pending%s", self.path, count, lost)
        self._fails, self._lost = False, 0

    def close(self) -> None:
        """Tries to write the pending records for the last time."""
        self.flush()
        if self._pending or self._lost:
            logger.warning("%s: %d entries were never written", self.path, len(self._pending) + self._lost)
        self._pending, self._lost = [], 0

    def _is_due(self) -> bool:
        return bool(self._pending)

    @abstractmethod
    def _write_pending(self) -> None:
        """Writes the pending records and removes the written ones from the list. Raises OSError."""

    @abstractmethod
    def _size_of(self, record: Record) -> int:
        """Bytes of a record in memory."""


class AppendedFile(Log[bytes]):
    """A file to which records are appended, each completely or not at all.

    The file is opened for each write, so it is created again if it was removed or moved.

    Args:
        prepare: called once before the first write, by `flush` even without a record; repeated after an OSError.
    """

    def __init__(self, path: Path, folder: LogFolder, prepare: Callable[[], None] | None = None):
        super().__init__(path, folder)
        self._prepare = prepare
        self._valid_end: tuple[int, int] | None = None  # after a failed write: inode, end of the last complete record

    def _is_due(self) -> bool:
        return bool(self._pending) or self._prepare is not None

    def _write_pending(self) -> None:
        if self._prepare is not None:
            self._prepare()
            self._prepare = None
        file = open_regular(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            status = os.fstat(file)
            inode, end = status.st_ino, status.st_size
            if self._valid_end is not None and self._valid_end[0] == inode and end > self._valid_end[1]:
                end = self._valid_end[1]
                os.ftruncate(file, end)
            self._valid_end = inode, end
            try:
                left = memoryview(b"".join(self._pending))
                while left:
                    left = left[os.write(file, left) :]
            except OSError:
                with contextlib.suppress(OSError):  # then the next write truncates it
                    os.ftruncate(file, end)
                raise
        finally:
            os.close(file)  # a network file system may report a full disk only now
        self._valid_end = None
        self._pending.clear()

    def _size_of(self, record: bytes) -> int:
        return len(record)


class PictureFolder(Log[tuple[str, np.ndarray]]):
    """A folder of PNG files. A record is (file name, picture), the picture uint8 (height, width, 3)."""

    def _write_pending(self) -> None:
        self.path.mkdir(exist_ok=True)
        while self._pending:
            name, picture = self._pending[0]
            write_png(self.path / name, picture)
            del self._pending[0]

    def _size_of(self, record: tuple[str, np.ndarray]) -> int:
        return record[1].nbytes
