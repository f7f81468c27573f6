"""Opens torch.save files safely: tensors are located and not read, no code is executed, time and memory are bounded.

A malicious file can be made to take any time or memory: compressed or overlapping records, a list that is referenced
many times, objects whose size is a number in the pickle. These are refused before torch opens the file, or while the
loaded tree is traversed.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megapromoe.conversion.stream import ConversionError, Stored

_MAX_PICKLE_BYTES = 1 << 26  # of data.pkl; about 200 per tensor
_MAX_INSTRUCTIONS = 5_000_000  # of data.pkl; about 30 per tensor
_MAX_VALUES = 2_000_000
_MAX_DEPTH = 50

# Classes of objects that training scripts and DeepSpeed save with tensors. Their objects are read as a `StandIn`; the
# classes themselves are not imported.
_STAND_INS = (
    "argparse.Namespace",
    *(f"pathlib.{name}" for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    "pathlib._local.PosixPath",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


class StandIn:
    """Replaces an object of a class in `_STAND_INS`; keeps the arguments and attributes that it was pickled with."""

    def __init__(self, *arguments: Any):
        self._arguments = arguments

    def content(self) -> Any:
        """The attributes of the object; without any, the arguments of its construction."""
        attributes = {name: value for name, value in vars(self).items() if name != "_arguments"}
        return attributes or list(getattr(self, "_arguments", ()))


def read_pickle(path: Path) -> Any:
    """The content of a torch.save file, with a `Stored` for each tensor. No tensor is read and no code is executed.

    Objects of `argparse.Namespace` and of the other classes in `_STAND_INS` are returned as a mapping of their
    attributes, or as the list of their constructor's arguments.

    Raises ConversionError: the file does not exist, was not written by torch.save, or holds other objects than tensors
    and plain values.

    Source: torch.load under FakeTensorMode, which stores the offset of each storage as `_checkpoint_offset`.
    """
    if not path.is_file():
        raise ConversionError(f"{path}: there is no such file")
    if not zipfile.is_zipfile(path):
        raise ConversionError(
            f"{path}: is not a complete zip archive of torch.save; the file is damaged, or of a torch older than 1.6"
            " (then load and save it with a newer torch); no code of the file was executed"
        )
    _refuse_bombs(path)
    try:
        with FakeTensorMode(), torch.serialization.safe_globals([(StandIn, name) for name in _STAND_INS]):
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        match = re.search(r"GLOBAL (\S+)", str(problem))
        name = f" ({match[1]})" if match else ""
        raise ConversionError(
            f"{path}: refused: it holds Python objects other than tensors and plain values{name}, and opening them"
            " could run code; no code of the file was executed. Ask its author for a file with tensors only"
        ) from problem
    except Exception as problem:  # torch raises exceptions of many types for damaged files
        raise ConversionError(f"{path}: is not a torch.save file, or is damaged ({problem!r})") from problem
    return _Converter(path).convert(tree)


def _refuse_bombs(path: Path) -> None:
    """Raises ConversionError for a small file that would take much memory or time to open.

    torch.save stores each record once and without compression, and its pickle is small compared with the tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if len({record.filename for record in records}) < len(records):
                raise ConversionError(f"{path}: two of its records have the same name; the file is damaged")
            if any(r.compress_type != zipfile.ZIP_STORED or r.compress_size != r.file_size for r in records):
                raise ConversionError(
                    f"{path}: has compressed records, which torch.save does not write; load and save it with torch"
                )
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise ConversionError(f"{path}: its records overlap; the file is damaged")
            for record in records:
                if record.filename.endswith("data.pkl"):
                    if record.file_size > _MAX_PICKLE_BYTES:
                        raise ConversionError(
                            f"{path}: {record.filename} has {record.file_size:,} bytes, more than {_MAX_PICKLE_BYTES:,}"
                        )
                    _refuse_pickle_bombs(path, archive.read(record))
    except ConversionError:
        raise
    except Exception as problem:  # zipfile and pickletools raise exceptions of many types for damaged files
        raise ConversionError(f"{path}: is not a torch.save file, or is damaged ({problem!r})") from problem


def _refuse_pickle_bombs(path: Path, data: bytes) -> None:
    for number, (code, argument, _) in enumerate(pickletools.genops(data)):
        if number > _MAX_INSTRUCTIONS:
            raise ConversionError(f"{path}: its pickle has more than {_MAX_INSTRUCTIONS:,} instructions")
        if (
            code.name == "GLOBAL" and str(argument).split(" ")[-1] == "bytearray"
        ):  # a number in the pickle gives its size
            raise ConversionError(
                f"{path}: refused: it holds Python objects other than tensors and plain values (bytearray); no code of"
                " the file was executed. Ask its author for a file with tensors only"
            )


class _Converter:
    """Replaces tensors by their location in the file; counts values, since a list can be referenced many times."""

    def __init__(self, path: Path):
        self.path, self.size, self.values = path, path.stat().st_size, 0

    def convert(self, tree: Any, depth: int = 0) -> Any:
        """The tree with a `Stored` for each tensor. Raises ConversionError if it is too large or malformed."""
        self.values += 1
        if self.values > _MAX_VALUES or depth > _MAX_DEPTH:
            raise ConversionError(
                f"{self.path}: refused: it expands to more than {_MAX_VALUES:,} values, or is nested more than"
                f" {_MAX_DEPTH} deep; a checkpoint has fewer"
            )
        if isinstance(tree, FakeTensor):
            stored = _location_of(tree, self.path)
            strides = zip(stored.shape, stored.stride or (), strict=False)
            span = 1 + sum((n - 1) * s for n, s in strides) if stored.stride else math.prod(stored.shape)
            if stored.nbytes > self.size or stored.offset + span * stored.dtype.itemsize > self.size:
                raise ConversionError(
                    f"{self.path}: a tensor of shape {stored.shape} is not within its {self.size} bytes; the file is"
                    " damaged"
                )
            return stored
        if isinstance(tree, StandIn):
            return self.convert(tree.content(), depth + 1)
        if isinstance(tree, Mapping):
            return {key: self.convert(value, depth + 1) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return [self.convert(value, depth + 1) for value in tree]
        return tree


def _location_of(tensor: FakeTensor, path: Path) -> Stored:
    storage_offset = tensor.untyped_storage()._checkpoint_offset
    assert storage_offset is not None, "torch.load sets it under FakeTensorMode"
    offset = int(storage_offset + tensor.storage_offset() * tensor.dtype.itemsize)
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    return Stored(path, offset, tuple(tensor.shape), tensor.dtype, stride)
