"""Files that are written as a whole: a reader, or a crash, finds the old content or the new, never a part.

A file is written under a temporary name beside its own (`staging_path`), flushed to the disk, and renamed. The name
ends in `.writing`, so that what a killed process left is recognised and removed by the next writer.

No symbolic link is followed for writing: where a link lies, it is replaced, or refused where a file is written in place
(`open_regular`), and what it leads to stays as it is. Folders above a file may be links.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

SUFFIX = ".writing"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # only writing has these
_FULL = 1 << 20  # bytes that are free where a disk counts as full


def staging_path(path: Path, concurrent: bool = False) -> Path:
    """The temporary name of `path`; with `concurrent` one of this process, where several may write the same file."""
    return path.with_name(f"{path.name}.{os.getpid()}{SUFFIX}" if concurrent else f"{path.name}{SUFFIX}")


@contextmanager
def naming_errors(path: Path, any_error: bool = False) -> Iterator[None]:
    """Gives an OSError that names no file, such as that of a full disk, the name of the file that the block writes.

    Args:
        any_error: the block does nothing but write this file; else errors that other files may have keep their text.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno is not None:
            if any_error or error.errno in _NO_ROOM:
                error.filename = str(path)
            raise
        if type(error) is not OSError:
            raise
        # numpy and Pillow write through C and report a text alone.
        full = shutil.disk_usage(path.parent).free < _FULL
        code, reason = (errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else (errno.EIO, str(error))
        raise OSError(code, reason, str(path)) from error


def sync(path: Path) -> None:
    """Flushes a file's, or a folder's, content to the disk. Raises OSError, which names it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming_errors(path, any_error=True):
            os.fsync(handle)
    finally:
        os.close(handle)


def commit(staging: Path, path: Path) -> None:
    """Flushes a finished file or folder to the disk and renames it to `path`, which it replaces. Raises OSError."""
    sync(staging)
    os.replace(staging, path)
    sync(path.parent)


@contextmanager
def atomic_write(path: Path, concurrent: bool = False) -> Iterator[IO[bytes]]:
    """Opens a temporary file for bytes; it becomes `path` when the block ends, and is removed when the block raises.

    Args:
        path: the file to write; its folder exists.
        concurrent: see `staging_path`.

    Raises OSError, which names the file.
    """
    with atomic_path(path, concurrent) as staging:
        created = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)  # never through a link
        with open(created, "wb") as file:
            yield file


@contextmanager
def atomic_path(path: Path, concurrent: bool = False) -> Iterator[Path]:
    """As `atomic_write`, for libraries that write to a name; the block creates the file of that name."""
    staging = staging_path(path, concurrent)
    staging.unlink(missing_ok=True)
    try:
        with naming_errors(path):
            yield staging
        commit(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes, parents: bool = False, concurrent: bool = False) -> None:
    """Writes a file as a whole. Raises OSError.

    Args:
        parents: make the folders above it.
        concurrent: see `staging_path`.
    """
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, concurrent) as file:
        file.write(content)


def write_text(path: Path, text: str, parents: bool = False, concurrent: bool = False) -> None:
    """As `write_bytes`, for text, in UTF-8."""
    write_bytes(path, text.encode(), parents, concurrent)


def write_json(
    path: Path, content: Any, indent: int | None = None, parents: bool = False, concurrent: bool = False
) -> None:
    """As `write_text`, for a value as JSON. Raises TypeError for what JSON cannot hold."""
    write_text(path, json.dumps(content, indent=indent) + "\n", parents, concurrent)


def open_regular(path: Path, flags: int) -> int:
    """Opens a file whose content is changed in place, such as a log or a lock, and returns its descriptor.

    What is written reaches no other file: no link is followed, neither symbolic nor hard, and no pipe is waited for.

    Args:
        flags: of `os.open`.

    Raises OSError, which says what is in the way.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP or not path.is_symlink():
            raise
        reason = f"is a symbolic link to {os.readlink(path)}, which is not followed; remove the link"
        raise OSError(errno.ELOOP, reason, str(path)) from error
    status = os.fstat(handle)
    problem = ""
    if not stat.S_ISREG(status.st_mode):
        problem = "is no regular file; remove it"
    elif status.st_nlink > 1:
        problem = (
            "is a hard link, so that other names of the file would change too; remove it, or put a copy in its place"
        )
    if problem:
        os.close(handle)
        raise OSError(errno.EINVAL, problem, str(path))
    return handle


def is_own_file(path: Path) -> bool:
    """Whether this is a file that no other name leads to: neither a symbolic nor a hard link. Raises OSError."""
    status = os.lstat(path)
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def append_text(path: Path, text: str) -> None:
    """Adds text to the end of a file, which is made if needed, and flushes it to the disk. Raises OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    with naming_errors(path, any_error=True), open(open_regular(path, flags), "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_tree(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary name for a file or a folder; it becomes `path` when the block ends, else it is removed.

    Args:
        path: the file or folder to make; folders above it are made.
        overwrite: replace what is at `path`; without it that is an OSError, and `path` stays as it is.
    """
    staging, replaced = staging_path(path), path.with_name(f"{path.name}.replaced")
    _remove(staging)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming_errors(path):
            yield staging
        if overwrite:
            _remove(replaced)
            if path.exists():
                os.replace(path, replaced)
            os.replace(staging, path)
            _remove(replaced)
        elif path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        else:
            os.rename(staging, path)
        sync(path.parent)
    finally:
        _remove(staging)


def sha256_of(path: Path, progress: Callable[[int], Any] | None = None) -> str:
    """SHA-256 of a file's content, in hexadecimal digits. `progress` is called with the bytes of each block."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def sha256_of_json(content: Any) -> str:
    """SHA-256 of a JSON value, in hexadecimal digits: the same however the value is laid out as text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
