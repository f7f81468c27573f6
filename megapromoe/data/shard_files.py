"""Files that the formats of latents and of text features share: a manifest with its hash, an index, shards as .npy.

Each function raises the error class that it is given, so that a message is of the format that was read.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from megapromoe.data.datasets import DatasetError
from megapromoe.io import sha256_of, sha256_of_json

logger = logging.getLogger(__name__)

HEADER = 128  # bytes before the first record of a shard: a .npy header, padded
REMEDY = "restore it from a copy, or encode again"
_NAME = re.compile(r"[\w-][\w.-]*")
T = TypeVar("T")


def hashed_json(manifest: Any) -> str:
    """A manifest (a dataclass) as JSON, with the SHA-256 of its content as `sha256`."""
    content = asdict(manifest)
    return json.dumps(content | {"sha256": sha256_of_json(content)}, indent=1) + "\n"


def read_hashed_json(
    path: Path,
    of: type[T],
    version: int,
    convert: Callable[[dict[str, Any]], T],
    problems_of: Callable[[T], Iterator[str]],
    missing: Callable[[], str],
    error: type[DatasetError],
    has_unhashed_versions: bool = False,
) -> T:
    """Reads a manifest that `hashed_json` wrote.

    Args:
        path: its file.
        of: the dataclass, whose fields are the keys of the file.
        version: the value of `format` that is read.
        convert: makes the manifest from the content of the file.
        problems_of: yields a sentence for each field that is not valid.
        missing: returns the message for a file that does not exist.
        error: the exception that is raised.
        has_unhashed_versions: read files without a hash, which older versions wrote, and log that they have none.

    Raises `error` if the file is missing, is not readable, or is not as it was written.
    """
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path} is not a regular file; {REMEDY}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as cause:
        raise error(missing()) from cause
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{path} cannot be read: {cause}; {REMEDY}") from cause
    if not isinstance(content, dict) or content.get("format") != version:
        version_read = content.get("format") if isinstance(content, dict) else None
        raise error(
            f"{path}: format {version_read!r}, this version reads {version}; encode again, or use the version that"
            " wrote it"
        )
    try:
        if has_unhashed_versions and "sha256" not in content:
            logger.info("%s was written by an older version and has no hash: damage may not be detected", path)
        elif content.pop("sha256", None) != sha256_of_json(content):
            raise ValueError("it does not match its hash")
        if keys := set(content) ^ {field.name for field in fields(of)}:  # type: ignore[arg-type]
            raise ValueError(f"keys {sorted(keys)} are missing or unknown")
        manifest = convert(content)
        if problem := next(problems_of(manifest), None):
            raise ValueError(problem)
    except (TypeError, ValueError, KeyError, IndexError) as cause:
        raise error(f"{path} is damaged: {cause}; {REMEDY}") from cause
    return manifest


def are_file_names(names: Iterable[Any]) -> bool:
    """Whether they are different names of files in one folder."""
    names = list(names)
    return all(isinstance(name, str) and _NAME.fullmatch(name) for name in names) and len(set(names)) == len(names)


def read_index(
    path: Path, sha256: str, columns: Iterable[str], records: int, error: type[DatasetError]
) -> dict[str, np.ndarray]:
    """Reads columns of the index, a value for each of `records` records; raises `error`."""
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path} is not a regular file; {REMEDY}")
        if sha256_of(path) != sha256:
            raise error(f"{path} is damaged: its SHA-256 differs from that in the manifest; {REMEDY}")
        with safe_open(path, "np") as file:
            values = {name: file.get_tensor(name) for name in columns}
    except (OSError, SafetensorError) as cause:
        raise error(f"{path} cannot be read: {cause}; {REMEDY}") from cause
    if lengths := {len(column) for column in values.values()} - {records}:
        raise error(f"{path} lists {min(lengths)} records, but the manifest gives {records}; encode again")
    return values


def open_shards(sizes: Mapping[Path, int], error: type[DatasetError]) -> list[BinaryIO]:
    """Opens shards and checks their sizes; raises `error`, which lists all that are missing or wrong.

    Args:
        sizes: path of each shard -> its bytes without the header.
    """
    files: list[BinaryIO] = []
    problems = []
    for path, content in sizes.items():
        if path.exists() and not path.is_file():
            problems.append(f"{path} is not a regular file")
            continue
        try:
            files.append(open(path, "rb"))  # noqa: SIM115, kept open
            if (size := os.fstat(files[-1].fileno()).st_size) != HEADER + content:
                problems.append(f"{path} has {size:,} bytes, not {HEADER + content:,}")
        except OSError as cause:
            problems.append(f"{path} cannot be opened: {cause.strerror}")
    if problems:
        for file in files:
            file.close()
        raise error("; ".join(problems) + "; restore them from a copy, or encode again")
    return files


def npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """The header of a .npy file, version 1.0, of a C-ordered array, padded to `HEADER` bytes."""
    text = repr({"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape})
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.encode().ljust(HEADER - 11) + b"\n"
