"""Tensors at rest: read one by one from safetensors and torch.save files, and written one by one into either.

Neither direction holds more than the tensor at hand: bytes are read with plain file reads, not mapped, and a file's
header, which comes first, is made from shapes. torch.save files are opened with `weights_only=True` alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapromoe.errors import UserError
from megapromoe.io import sync

Progress = Callable[[int], Any]

# Source: the safetensors format, "dtype" of its header.
_SAFE_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SAFE_NAMES = {dtype: name for name, dtype in _SAFE_TYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_ALIGNMENT = 64  # of a tensor's bytes in a torch.save file


class ConversionError(UserError):
    """A checkpoint that cannot be read, or not be written as what was asked for."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where its first element lies and how the others follow (`stride`, None: densely)."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, in memory. Raises ConversionError if the file is shorter than it says."""
        if self.stride is None:
            out = torch.empty(self.shape, dtype=self.dtype)
            self.read_into(out)
            return out
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if self.nbytes else 0
        flat = Stored(self.file, self.offset, (span,), self.dtype).read()
        return flat.as_strided(self.shape, self.stride).contiguous()

    def read_into(self, out: Tensor) -> None:
        """Fills the contiguous tensor `out` of the same shape; of another dtype, by conversion."""
        if self.stride is not None or out.dtype != self.dtype:
            dense = self if self.stride is not None else Stored(self.file, self.offset, self.shape, self.dtype)
            out.copy_(dense.read())
            return
        if not self.nbytes:
            return
        room = out.view(-1).view(torch.uint8).numpy().data
        with open(self.file, "rb", buffering=0) as f:
            f.seek(self.offset)
            done = 0
            while done < len(room):
                got = f.readinto(room[done:])
                if not got:
                    raise ConversionError(f"{self.file}: ends within a tensor; the file is damaged, copy it again")
                done += got


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its shape and dtype, and how to get it when its turn comes.

    `turn` orders the reading in `write_pickle`, so that what shares a source tensor is written in one go.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    turn: tuple = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def entry_of(tensor: Tensor) -> Entry:
    """A tensor that is at hand already."""
    return Entry(tuple(tensor.shape), tensor.dtype, lambda: tensor)


# ---- safetensors


def read_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file, unread, and its metadata. Raises ConversionError naming what is wrong."""
    bad = f"{path}: is no safetensors file, or damaged"
    try:
        if path.exists() and not path.is_file():
            raise ConversionError(f"{path}: is no regular file")
        size = path.stat().st_size
        with open(path, "rb") as f:
            start = f.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ConversionError(f"{bad} (its header does not fit it)")
            header = json.loads(f.read(length), object_pairs_hook=without_duplicates)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ must hold text alone")
        tensors = {name: _described(path, 8 + length, said) for name, said in header.items()}
    except OSError as problem:
        raise ConversionError(f"{path}: {problem.strerror}") from problem
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise ConversionError(f"{bad} (its header cannot be read: {problem!r})") from problem
    end = 8 + length
    for name, one in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if one.offset + one.nbytes > size:
            raise ConversionError(f"{bad} ({name} does not lie within its {size} bytes)")
        if one.offset != end:
            what = "overlaps the tensor before it" if one.offset < end else "comes after bytes of no tensor"
            raise ConversionError(f"{bad} ({name} {what})")
        end += one.nbytes
    if end != size:
        raise ConversionError(f"{bad} ({size - end} bytes at its end are of no tensor)")
    return tensors, metadata


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in content if names.count(name) > 1)!r} stands twice")
    return content


def _described(path: Path, start: int, said: Any) -> Stored:
    """A tensor as a safetensors header describes it; raises ValueError, KeyError or TypeError if that is malformed."""
    if set(said) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"a tensor has dtype, shape and data_offsets, not {sorted(said)}")
    numbers = [*said["shape"], *said["data_offsets"]]
    if len(said["data_offsets"]) != 2 or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError(
            f"shape {said['shape']} and data_offsets {said['data_offsets']} must be whole numbers, 0 or more"
        )
    begin, end = said["data_offsets"]
    one = Stored(path, start + begin, tuple(said["shape"]), _SAFE_TYPES[said["dtype"]])
    if end - begin != one.nbytes:
        raise ValueError(f"data_offsets {said['data_offsets']} do not hold a tensor of shape {said['shape']}")
    return one


def write_safetensors(
    path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], progress: Progress | None = None
) -> tuple[int, str]:
    """Writes a safetensors file tensor by tensor, in the order of `entries`; returns its size and sha256."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, one in entries.items():
        begin, end = end, end + one.nbytes
        header[name] = {"dtype": _SAFE_NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for block in (struct.pack("<Q", len(text)), text):
            file.write(block)
            digest.update(block)
        for name, one in entries.items():
            _put(_bytes_of(name, one), file.write, digest.update)
            if progress:
                progress(one.nbytes)
    sync(path)
    return 8 + len(text) + end, digest.hexdigest()


# ---- torch.save


def write_pickle(path: Path, tree: Any, progress: Progress | None = None) -> None:
    """Writes plain values and `Entry`s as torch.save would; `torch.load(weights_only=True, mmap=True)` reads it.

    Source: torch.save's format: an uncompressed zip of data.pkl, whose tensors name records data/0, data/1, ...
    """
    text = io.BytesIO()
    pickler = _Pickler(text, protocol=2)
    pickler.dump(tree)
    records = sorted(enumerate(pickler.entries), key=lambda numbered: numbered[1].turn)
    with open(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", text.getvalue())
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for number, one in records:
            with archive.open(_aligned(archive, f"archive/data/{number}"), "w", force_zip64=True) as record:
                record.write(_bytes_of(f"tensor {number}", one))
            if progress:
                progress(one.nbytes)
    sync(path)


class _Storage:
    """Stands in the pickle for the bytes of an entry."""

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
    """A record whose content will start at a multiple of the alignment, by an extra field that readers skip."""
    info = zipfile.ZipInfo(name)
    assert archive.fp is not None, "the archive is open"
    fixed = 30 + len(name) + 20 + 4  # local header, name, zip64's extra field, the head of ours
    padding = -(archive.fp.tell() + fixed) % _ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + b"\0" * padding
    return info


def _put(block: memoryview, *takers: Callable[[memoryview], Any]) -> None:
    """Hands a tensor's bytes out, and lets go of them before the next are read."""
    for take in takers:
        take(block)


def _bytes_of(name: str, one: Entry) -> memoryview:
    tensor = one.read()
    if tuple(tensor.shape) != one.shape or tensor.dtype != one.dtype:
        raise ConversionError(
            f"{name}: is {tensor.dtype} {tuple(tensor.shape)}, announced as {one.dtype} {one.shape}; the source changed"
            " while it was read"
        )
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
