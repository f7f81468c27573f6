"""Files that are written as a whole: a reader, or a crash, finds the old content or the new, never a part.

A file is written under a temporary name beside its own (`staging_path`), flushed to the disk, and renamed. The name
ends in `.writing`, so that what a killed process left is recognised and removed by the next writer.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

SUFFIX = ".writing"


def staging_path(path: Path, concurrent: bool = False) -> Path:
    """The temporary name of `path`; with `concurrent` one of this process, where several may write the same file."""
    return path.with_name(f"{path.name}.{os.getpid()}{SUFFIX}" if concurrent else f"{path.name}{SUFFIX}")


def sync(path: Path) -> None:
    """Flushes a file's, or a folder's, content to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
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

    Raises OSError.
    """
    with atomic_path(path, concurrent) as staging, open(staging, "wb") as file:
        yield file


@contextmanager
def atomic_path(path: Path, concurrent: bool = False) -> Iterator[Path]:
    """As `atomic_write`, for libraries that write to a name; the block creates the file of that name."""
    staging = staging_path(path, concurrent)
    try:
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
