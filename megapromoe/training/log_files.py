"""Logs of a run that survive a full disk, and a run directory that is renamed or removed for a while.

What cannot be written is kept in memory, and written as soon as it can be. Training goes on meanwhile: a log never
raises OSError. Each log warns once when it cannot be written, and reports when it can again.
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
    """The run directory that logs are written to: the same one as at the start, whatever its path leads to later.

    Where a run directory is removed while its run goes on, another run may take the path; its logs are not to be
    mixed with these. A directory that was copied or mounted again is recognised by its environment.json, which holds
    every start with its time and process.
    """

    def __init__(self, path: Path):
        """Raises OSError if there is no such folder."""
        self.path = Path(path)
        self._handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)  # as long as it is open, its inode is its own
        self._starts = self._read_starts()

    def check(self) -> None:
        """Raises OSError unless the path leads to the folder of the start."""
        if os.path.samestat(os.stat(self.path), os.fstat(self._handle)):
            return
        if self._starts is None or self._read_starts() != self._starts:
            raise OSError(errno.ESTALE, "another folder has taken the place of this run's", str(self.path))
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        os.close(self._handle)
        self._handle = handle

    def close(self) -> None:
        """Frees the folder. No `check` may follow."""
        os.close(self._handle)

    def _read_starts(self) -> bytes | None:
        try:
            return (self.path / "environment.json").read_bytes()
        except FileNotFoundError:
            return None


class Log(ABC, Generic[Record]):
    """Records that are written in their order; those that cannot be are tried again with the next one.

    Args:
        path: the file or folder that is written, below `folder`.
        folder: the run directory.
    """

    def __init__(self, path: Path, folder: LogFolder):
        self.path, self.folder = path, folder
        self._pending: list[Record] = []
        self._lost = 0
        self._fails = False

    def write(self, record: Record) -> None:
        """Writes the records that are pending, and this one. Beyond `MAX_PENDING` bytes of them this one is lost."""
        self._pending.append(record)
        self.flush()
        if sum(map(self._size_of, self._pending)) > MAX_PENDING:
            self._pending.pop()
            self._lost += 1

    def flush(self) -> None:
        """Tries to write what is pending."""
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
                    "%s: cannot be written (%s); training goes on, and what is logged waits in memory",
                    *(error.filename or self.path, error.strerror or error),
                )
            self._fails = True
            return
        if self._fails:
            lost = f", but {self._lost} entries were too many to keep" if self._lost else ""
            logger.warning("%s: can be written again, and has the %d entries that waited%s", self.path, count, lost)
        self._fails, self._lost = False, 0

    def close(self) -> None:
        """Tries to write what is pending for the last time."""
        self.flush()
        if self._pending or self._lost:
            logger.warning("%s: %d entries were never written", self.path, len(self._pending) + self._lost)
        self._pending, self._lost = [], 0

    def _is_due(self) -> bool:
        return bool(self._pending)

    @abstractmethod
    def _write_pending(self) -> None:
        """Writes the pending records, and removes from them what is written. Raises OSError."""

    @abstractmethod
    def _size_of(self, record: Record) -> int:
        """Bytes of a record in memory."""


class AppendedFile(Log[bytes]):
    """A file to whose end records are written; none is left there in part.

    The file is opened anew for each record, so that one which was removed or moved away begins again.

    Args:
        prepare: called before the first record is written, by `flush` also without one; again after an OSError.
    """

    def __init__(self, path: Path, folder: LogFolder, prepare: Callable[[], None] | None = None):
        super().__init__(path, folder)
        self._prepare = prepare
        self._whole: tuple[int, int] | None = None  # after a failed write: the file, and where its whole records end

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
            if self._whole is not None and self._whole[0] == inode and end > self._whole[1]:
                end = self._whole[1]
                os.ftruncate(file, end)
            self._whole = inode, end
            try:
                left = memoryview(b"".join(self._pending))
                while left:
                    left = left[os.write(file, left) :]
            except OSError:
                with contextlib.suppress(OSError):  # then the next write does it
                    os.ftruncate(file, end)
                raise
        finally:
            os.close(file)  # a file system of the network may report only now that the disk is full
        self._whole = None
        self._pending.clear()

    def _size_of(self, record: bytes) -> int:
        return len(record)


class PictureFolder(Log[tuple[str, np.ndarray]]):
    """A folder of PNG files. A record is a name and a picture, uint8 (height, width, 3)."""

    def _write_pending(self) -> None:
        self.path.mkdir(exist_ok=True)
        while self._pending:
            name, picture = self._pending[0]
            write_png(self.path / name, picture)
            del self._pending[0]

    def _size_of(self, record: tuple[str, np.ndarray]) -> int:
        return record[1].nbytes
