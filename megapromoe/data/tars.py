"""WebDataset tars: samples of files with one key, read at any position.

The rules are those of the webdataset library, whose functions split names and group files. It reads tars as streams;
here the headers are listed once, so that any sample can be read by its position in the file.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megapromoe.data.images import ImageError

_META = re.compile(r"__[^/]*__($|/)")  # files that the library ignores
OPEN_FILES = 16  # tars that are kept open


class TarError(ImageError):
    """A tar cannot be read."""

    on_all_ranks = True  # every rank reads the same files


@dataclass(frozen=True)
class Member:
    """A file in a tar.

    Attributes:
        path: name of the tar, "/", name in the tar.
        tar: number of the tar.
        offset, size: bytes in the tar.
    """

    path: str
    tar: int
    offset: int
    size: int


@dataclass(frozen=True)
class Sample:
    """The files of a tar that have one key.

    Attributes:
        name: name of the tar, "/", key.
        members: by what follows the first dot of their names, in lower case.
    """

    name: str
    members: dict[str, Member]


def expand(pattern: str) -> list[Path]:
    """The files of a pattern with braces, such as "train-{000..099}.tar". Raises TarError if one does not exist."""
    shardlists = _library().shardlists
    paths = [Path(name) for name in (shardlists.expand_urls(pattern) if "{" in pattern else [pattern])]
    if missing := [path for path in paths if not path.is_file()]:
        raise TarError(f"{missing[0]}: no such file ({len(missing)} of {len(paths)} are missing); give existing tars")
    return paths


class TarFiles:
    """Uncompressed tar files.

    Args:
        paths: the files, in the order of their samples.

    Raises TarError if a file cannot be opened.
    """

    def __init__(self, paths: list[Path]):
        self.paths = paths
        folder = os.path.commonpath([path.parent for path in paths])
        self._names = [os.path.relpath(path, folder) for path in paths]
        self._members: dict[str, Member] = {}
        # Threads read near each other. A file that leaves the cache is closed when its last reader is done.
        self._file = lru_cache(maxsize=OPEN_FILES)(lambda number: open(paths[number], "rb"))  # noqa: SIM115

    def samples(self) -> Iterator[Sample]:
        """All samples. Raises TarError for a file that is damaged, compressed or has two files of one name."""
        group_by_keys = _library().tariterators.group_by_keys
        for number, path in enumerate(self.paths):
            listed = ({"fname": m.path, "data": m, "__url__": str(path)} for m in self._list(number))
            try:
                for sample in group_by_keys(listed):
                    members = {ext: m for ext, m in sample.items() if isinstance(m, Member)}
                    if twice := next((m.path for m in members.values() if m.path in self._members), None):
                        raise TarError(f"{twice} occurs twice; write the tar again, with different names")
                    self._members |= {m.path: m for m in members.values()}
                    yield Sample(sample["__key__"], members)
            except (ValueError, tarfile.TarError, OSError, EOFError) as error:
                if isinstance(error, ImageError):
                    raise
                reason = " ".join(str(error.args[0] if error.args else error).split())
                raise TarError(f"{path} cannot be read as an uncompressed tar: {reason}; write it again") from error

    def read(self, member: Member) -> bytes:
        """The content of a file."""
        try:
            file = self._file(member.tar)
            content = os.pread(file.fileno(), member.size, member.offset)
        except OSError as error:
            raise TarError(f"{self.paths[member.tar]} cannot be read: {error.strerror}; check its disk") from error
        if len(content) != member.size:
            raise TarError(f"{self.paths[member.tar]} is cut off within {member.path}; write it again")
        return content

    def read_path(self, path: str) -> bytes:
        """The content of a file that `samples` has listed, by its path."""
        return self.read(self._members[path])

    def _list(self, number: int) -> Iterator[Member]:
        path, end = self.paths[number], 0
        with tarfile.open(path, "r:") as file:
            for entry in file:
                end = entry.offset_data + -(-entry.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if entry.isfile() and not _META.match(entry.name):
                    name = f"{self._names[number]}/{entry.name}"
                    yield Member(name, number, entry.offset_data, entry.size)
        # tarfile takes a file that ends within a header for complete.
        with open(path, "rb") as content:
            if os.pread(content.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
                raise TarError(f"{path} is cut off: the mark at its end is missing; write it again")


def _library():
    """The webdataset library. Raises TarError if it is not installed."""
    try:
        import webdataset
        import webdataset.shardlists
        import webdataset.tariterators
    except ImportError as error:
        raise TarError("tars need webdataset: pip install 'megapromoe[data]'") from error
    return webdataset
