"""Reads safetensors and torch.save files tensor by tensor, and writes the latter.

At most one tensor is in memory: bytes are read with file reads and not through a memory map. torch.save files are
opened with `weights_only=True` only. `checkpoint/tensor_writer.py` writes safetensors.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapromoe.checkpoint.tensor_writer import SAFE_TYPES, Entry, Progress, bytes_of
from megapromoe.errors import UserError
from megapromoe.io import sync

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_ALIGNMENT = 64  # bytes, of a tensor in a torch.save file


class ConversionError(UserError):
    """A checkpoint cannot be read, or cannot be written in the requested format."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: path of the file.
        offset: position of the first element, in bytes.
        shape, dtype: of the tensor.
        stride: in elements; None: contiguous.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Reads the tensor. Raises ConversionError if the file ends too early."""
        if self.stride is None:
            out = torch.empty(self.shape, dtype=self.dtype)
            self.read_into(out)
            return out
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if self.nbytes else 0
        flat = Stored(self.file, self.offset, (span,), self.dtype).read()
        return flat.as_strided(self.shape, self.stride).contiguous()

    def read_into(self, out: Tensor) -> None:
        """Reads into the contiguous tensor `out` of the same shape, with a conversion to its dtype."""
        if self.stride is not None or out.dtype != self.dtype:
            dense = self if self.stride is not None else Stored(self.file, self.offset, self.shape, self.dtype)
            out.copy_(dense.read())
            return
        if not self.nbytes:
            return
        buffer = out.view(-1).view(torch.uint8).numpy().data
        with open(self.file, "rb", buffering=0) as f:
            f.seek(self.offset)
            done = 0
            while done < len(buffer):
                count = f.readinto(buffer[done:])
                if not count:
                    raise ConversionError(f"{self.file}: ends inside a tensor; the file is damaged, copy it again")
                done += count


# ---- safetensors


def read_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors (not read yet) and the metadata of a safetensors file. Raises ConversionError if it is malformed."""
    bad = f"{path}: is not a safetensors file, or is damaged"
    try:
        if path.exists() and not path.is_file():
            raise ConversionError(f"{path}: is not a regular file")
        size = path.stat().st_size
        with open(path, "rb") as f:
            start = f.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise ConversionError(f"{bad} (its header does not fit it)")
            header = json.loads(f.read(length), object_pairs_hook=without_duplicates)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ must hold text only")
        tensors = {name: _parse_entry(path, 8 + length, entry) for name, entry in header.items()}
    except OSError as problem:
        raise ConversionError(f"{path}: {problem.strerror}") from problem
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise ConversionError(f"{bad} (its header cannot be read: {problem!r})") from problem
    end = 8 + length
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if stored.offset + stored.nbytes > size:
            raise ConversionError(f"{bad} ({name} is not within its {size} bytes)")
        if stored.offset != end:
            fault = "overlaps the tensor before it" if stored.offset < end else "comes after unused bytes"
            raise ConversionError(f"{bad} ({name} {fault})")
        end += stored.nbytes
    if end != size:
        raise ConversionError(f"{bad} ({size - end} unused bytes at its end)")
    return tensors, metadata


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` of json.loads that raises ValueError for a name that occurs twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in content if names.count(name) > 1)!r} occurs twice")
    return content


def _parse_entry(path: Path, start: int, entry: Any) -> Stored:
    """A tensor from its entry in a safetensors header; raises ValueError, KeyError or TypeError if it is malformed."""
    if set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"a tensor has dtype, shape and data_offsets, not {sorted(entry)}")
    numbers = [*entry["shape"], *entry["data_offsets"]]
    if len(entry["data_offsets"]) != 2 or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError(
            f"shape {entry['shape']} and data_offsets {entry['data_offsets']} must be whole numbers, 0 or more"
        )
    begin, end = entry["data_offsets"]
    stored = Stored(path, start + begin, tuple(entry["shape"]), SAFE_TYPES[entry["dtype"]])
    if end - begin != stored.nbytes:
        raise ValueError(f"data_offsets {entry['data_offsets']} do not hold a tensor of shape {entry['shape']}")
    return stored


# ---- torch.save


def write_pickle(path: Path, tree: Any, progress: Progress | None = None) -> None:
    """Writes plain values and `Entry`s like torch.save; `torch.load(weights_only=True, mmap=True)` reads the file.

    Source: torch.save's format: an uncompressed zip of data.pkl, whose tensors name records data/0, data/1, ...
    """
    text = io.BytesIO()
    pickler = _Pickler(text, protocol=2)
    pickler.dump(tree)
    records = sorted(enumerate(pickler.entries), key=lambda numbered: numbered[1].order)
    with open(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", text.getvalue())
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for number, entry in records:
            with archive.open(_aligned(archive, f"archive/data/{number}"), "w", force_zip64=True) as record:
                record.write(bytes_of(f"tensor {number}", entry))
            if progress:
                progress(entry.nbytes)
    sync(path)


class _Storage:
    """Represents the bytes of an entry in the pickle."""

    def __init__(self, key: str, entry: Entry):
        self.key, self.entry = key, entry


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, protocol: int):
        super().__init__(file, protocol)
        self.entries: list[Entry] = []

    def persistent_id(self, obj: Any) -> tuple | None:
        if not isinstance(obj, _Storage):
            return None
        kind = torch.storage._dtype_to_storage_type_map()[obj.entry.dtype]
        return ("storage", getattr(torch, kind), obj.key, "cpu", math.prod(obj.entry.shape))

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Entry):
            return NotImplemented
        storage = _Storage(str(len(self.entries)), obj)
        self.entries.append(obj)
        stride = [math.prod(obj.shape[i + 1 :]) for i in range(len(obj.shape))]
        return torch._utils._rebuild_tensor_v2, (storage, 0, obj.shape, tuple(stride), False, OrderedDict())


def _aligned(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """A record whose content starts at a multiple of the alignment, because of an extra field that readers skip."""
    info = zipfile.ZipInfo(name)
    assert archive.fp is not None, "the archive is open"
    fixed = 30 + len(name) + 20 + 4  # local header, name, zip64's extra field, header of our extra field
    padding = -(archive.fp.tell() + fixed) % _ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + b"\0" * padding
    return info
