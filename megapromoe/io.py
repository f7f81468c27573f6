"""Atomic writes of files: readers see the old content or the new, also after a crash, and never a part of it.

A file is written under a temporary name in the same folder (`staging_path`), flushed to the disk, and renamed. The
temporary name ends in `.writing`, so the next writer can recognise and remove the file of a killed process.

Writing never follows a symbolic link. A link in the place of the file is replaced, or refused for files that are
changed in place (`open_regular`); its target is not changed. Folders above the file may be links.
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
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # only writing raises these
_FULL = 1 << 20  # a disk with fewer free bytes is regarded as full


def staging_path(path: Path, concurrent: bool = False) -> Path:
    """The temporary name of `path`; with `concurrent`, for files that several processes write, it contains the pid."""
    return path.with_name(f"{path.name}.{os.getpid()}{SUFFIX}" if concurrent else f"{path.name}{SUFFIX}")


@contextmanager
def naming_errors(path: Path, any_error: bool = False) -> Iterator[None]:
    """Adds the file name to an OSError without one, such as that of a full disk.

    Args:
        path: the file that the block writes.
        any_error: the block only writes this file, so every error is about it. Otherwise the name is added only to
            errors of writing, since others may be about other files.
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
        # numpy and Pillow write in C and raise an OSError with a text but without an errno.
        full = shutil.disk_usage(path.parent).free < _FULL
        code, reason = (errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else (errno.EIO, str(error))
        raise OSError(code, reason, str(path)) from error


def sync(path: Path) -> None:
    """Flushes the content of a file or a folder to the disk. Raises OSError, which names it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming_errors(path, any_error=True):
            os.fsync(handle)
    finally:
        os.close(handle)


def commit(staging: Path, path: Path) -> None:
    """Flushes a complete file or folder to the disk and renames it to `path`, replacing that. Raises OSError."""
    sync(staging)
    os.replace(staging, path)
    sync(path.parent)


@contextmanager
def atomic_write(path: Path, concurrent: bool = False) -> Iterator[IO[bytes]]:
    """Opens a temporary binary file. It is renamed to `path` when the block ends, and removed if the block raises.

    Args:
        path: the file to write, in an existing folder.
        concurrent: see `staging_path`.

    Raises OSError, which names the file.
    """
    with atomic_path(path, concurrent) as staging:
        created = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)  # never through a link
        with open(created, "wb") as file:
            yield file


@contextmanager
def atomic_path(path: Path, concurrent: bool = False) -> Iterator[Path]:
    """Like `atomic_write`, for libraries that need a path: the block creates the file at the yielded path."""
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
    """Writes a file atomically. Raises OSError.

    Args:
        parents: create the folders above it.
        concurrent: see `staging_path`.
    """
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, concurrent) as file:
        file.write(content)


def write_text(path: Path, text: str, parents: bool = False, concurrent: bool = False) -> None:
    """Like `write_bytes`, for a text, in UTF-8."""
    write_bytes(path, text.encode(), parents, concurrent)


def write_json(
    path: Path, content: Any, indent: int | None = None, parents: bool = False, concurrent: bool = False
) -> None:
    """Like `write_text`, for a value as JSON. Raises TypeError if JSON cannot represent it."""
    write_text(path, json.dumps(content, indent=indent) + "\n", parents, concurrent)


def open_regular(path: Path, flags: int) -> int:
    """Opens a file that is changed in place, such as a log or a lock, and returns its descriptor.

    Only regular files without other names are opened: symbolic links, hard links and pipes are refused, so writing
    cannot change another file.

    Args:
        flags: flags of `os.open`.

    Raises OSError, which names the reason.
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
    """Whether this is a regular file without other names: neither a symbolic nor a hard link. Raises OSError."""
    status = os.lstat(path)
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def append_text(path: Path, text: str) -> None:
    """Appends text to a file, which is created if needed, and flushes it to the disk. Raises OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    with naming_errors(path, any_error=True), open(open_regular(path, flags), "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_tree(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary path for a file or a folder. It is renamed to `path` when the block ends, else removed.

    Args:
        path: the file or folder to create; folders above it are created.
        overwrite: replace an existing `path`; otherwise that raises OSError and leaves `path` unchanged.
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
    """SHA-256 of the content of a file, hexadecimal. `progress` is called with the number of bytes of each block."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def sha256_of_json(content: Any) -> str:
    """SHA-256 of a JSON value, hexadecimal, independent of the formatting of the JSON text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
