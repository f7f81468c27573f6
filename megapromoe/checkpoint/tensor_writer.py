"""Writes safetensors files tensor by tensor: the header, which precedes the tensors, is computed from shapes.

So a file can be written from tensors that are made, or copied from a device, one after the other.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
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
SAFE_TYPES = {
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
_SAFE_NAMES = {dtype: name for name, dtype in SAFE_TYPES.items()}


class SourceChanged(UserError):
    """A tensor is not what it was when the header was written."""


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        shape, dtype: of the tensor.
        read: returns the tensor; called when it is written.
        order: sort key for `write_pickle`, so that tensors from the same source are written one after the other.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    order: tuple = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def entry_of(tensor: Tensor) -> Entry:
    """An entry for a tensor in memory."""
    return Entry(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def write_safetensors(
    path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], progress: Progress | None = None
) -> tuple[int, str]:
    """Writes a safetensors file tensor by tensor, in the order of `entries`; returns its size and SHA-256."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.nbytes
        header[name] = {"dtype": _SAFE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for block in (struct.pack("<Q", len(text)), text):
            file.write(block)
            digest.update(block)
        for name, entry in entries.items():
            _pass_to(bytes_of(name, entry), file.write, digest.update)
            if progress:
                progress(entry.nbytes)
    sync(path)
    return 8 + len(text) + end, digest.hexdigest()


def _pass_to(block: memoryview, *functions: Callable[[memoryview], Any]) -> None:
    """Calls the functions with a tensor's bytes; a separate function, so that the bytes are freed on return."""
    for function in functions:
        function(block)


def bytes_of(name: str, entry: Entry) -> memoryview:
    """The bytes of an entry, which is read. Raises SourceChanged if it is another tensor than announced."""
    tensor = entry.read()
    if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
        raise SourceChanged(
            f"{name}: is {tensor.dtype} {tuple(tensor.shape)}, expected {entry.dtype} {entry.shape}; the source changed"
            " while it was read, repeat the command"
        )
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
