"""Files that are written as a whole: a reader, or a crash, finds the old content or the new, never a part.

A file is written under a temporary name beside its own (`staging_path`), flushed to the disk, and renamed. The name
ends in `.writing`, so that what a killed process left is recognised and removed by the next writer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
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


def write_bytes(path: Path, content: bytes, concurrent: bool = False) -> None:
    """Writes a file as a whole. Raises OSError."""
    with atomic_write(path, concurrent) as file:
        file.write(content)


def write_text(path: Path, text: str, concurrent: bool = False) -> None:
    """Writes a file as a whole, in UTF-8. Raises OSError."""
    write_bytes(path, text.encode(), concurrent)


def write_json(path: Path, content: Any, indent: int | None = None, concurrent: bool = False) -> None:
    """Writes a JSON file as a whole. Raises OSError, or TypeError or ValueError for what JSON does not hold."""
    write_text(path, json.dumps(content, indent=indent, allow_nan=True) + "\n", concurrent)
