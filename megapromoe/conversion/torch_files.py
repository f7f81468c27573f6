"""Opens torch.save files: tensors by where they lie, no code of the file executed, time and memory bounded.

A stranger's file may be made to take any time or memory: compressed or overlapping records, one list that stands in
many places, objects whose size is a number. Each is refused before torch opens the file, or while its tree is walked.
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

_LONGEST_PICKLE = 1 << 26  # bytes of data.pkl: a tensor takes some 200
_MOST_CODES = 5_000_000  # instructions of it: a tensor takes some 30
_MOST_VALUES = 2_000_000
_DEEPEST = 50

# What training scripts and DeepSpeed put beside tensors. Objects of these names are read as a `StandIn`: nothing of
# the class that they name is imported or run.
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
    """Takes the place of an object of `_STAND_INS`: keeps the arguments and attributes that it was pickled with."""

    def __init__(self, *arguments: Any):
        self._arguments = arguments

    def content(self) -> Any:
        """Its attributes, or without any the arguments that it was made from."""
        attributes = {name: value for name, value in vars(self).items() if name != "_arguments"}
        return attributes or list(getattr(self, "_arguments", ()))


def read_pickle(path: Path) -> Any:
    """What a torch.save file holds, with `Stored` for each tensor; none is read, and no code of the file is run.

    An `argparse.Namespace` and a few other objects (`_STAND_INS`) come as a mapping of their attributes, or as the list
    of the arguments that they were made from.

    Raises ConversionError: no such file, not of torch.save, or it holds more than tensors and plain values.

    Source: torch.load under FakeTensorMode, which keeps the place of each storage as `_checkpoint_offset`.
    """
    if not path.is_file():
        raise ConversionError(f"{path}: there is no such file")
    if not zipfile.is_zipfile(path):
        raise ConversionError(
            f"{path}: is no complete zip archive as torch.save writes it; the file is damaged, or older than torch 1.6"
            " (then load and save it with a newer torch); nothing of it was executed"
        )
    _refuse_bombs(path)
    try:
        with FakeTensorMode(), torch.serialization.safe_globals([(StandIn, name) for name in _STAND_INS]):
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        found = re.search(r"GLOBAL (\S+)", str(problem))
        what = f" ({found[1]})" if found else ""
        raise ConversionError(
            f"{path}: refused: it holds Python objects other than tensors and plain values{what}, and opening them"
            " could run code; nothing of it was executed. Ask its author for a file of tensors alone"
        ) from problem
    except Exception as problem:  # torch raises what it likes on damaged files
        raise ConversionError(f"{path}: is no file of torch.save, or damaged ({problem!r})") from problem
    return _AtRest(path).convert(tree)


def _refuse_bombs(path: Path) -> None:
    """Raises ConversionError for a small file that would take much memory or time to open.

    torch.save stores without compression, each record once; what it pickles is short beside its tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if len({record.filename for record in records}) < len(records):
                raise ConversionError(f"{path}: two of its records have one name; the file is damaged")
            if any(r.compress_type != zipfile.ZIP_STORED or r.compress_size != r.file_size for r in records):
                raise ConversionError(
                    f"{path}: has compressed records, which torch.save does not write; load and save it with torch"
                )
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise ConversionError(f"{path}: its records overlap; the file is damaged")
            for record in records:
                if record.filename.endswith("data.pkl"):
                    if record.file_size > _LONGEST_PICKLE:
                        raise ConversionError(
                            f"{path}: {record.filename} has {record.file_size:,} bytes, more than {_LONGEST_PICKLE:,}"
                        )
                    _refuse_pickle_bombs(path, archive.read(record))
    except ConversionError:
        raise
    except Exception as problem:  # zipfile and pickletools raise what they like on damaged files
        raise ConversionError(f"{path}: is no file of torch.save, or damaged ({problem!r})") from problem


def _refuse_pickle_bombs(path: Path, data: bytes) -> None:
    for number, (code, argument, _) in enumerate(pickletools.genops(data)):
        if number > _MOST_CODES:
            raise ConversionError(f"{path}: its pickle has more than {_MOST_CODES:,} instructions")
        if code.name == "GLOBAL" and str(argument).split(" ")[-1] == "bytearray":  # one number makes it of any size
            raise ConversionError(
                f"{path}: refused: it holds Python objects other than tensors and plain values (bytearray); nothing of"
                " it was executed. Ask its author for a file of tensors alone"
            )


class _AtRest:
    """Replaces tensors by where they lie; counts values, since one list may stand in many places."""

    def __init__(self, path: Path):
        self.path, self.size, self.values = path, path.stat().st_size, 0

    def convert(self, tree: Any, depth: int = 0) -> Any:
        """The tree with `Stored` for each tensor. Raises ConversionError: too large, or outside the file."""
        self.values += 1
        if self.values > _MOST_VALUES or depth > _DEEPEST:
            raise ConversionError(
                f"{self.path}: refused: it stands for more than {_MOST_VALUES:,} values, or they are nested more than"
                f" {_DEEPEST} deep; a checkpoint has fewer"
            )
        if isinstance(tree, FakeTensor):
            stored = _at_rest(tree, self.path)
            strides = zip(stored.shape, stored.stride or (), strict=False)
            span = 1 + sum((n - 1) * s for n, s in strides) if stored.stride else math.prod(stored.shape)
            if stored.nbytes > self.size or stored.offset + span * stored.dtype.itemsize > self.size:
                where = f"does not lie within its {self.size} bytes"
                raise ConversionError(f"{self.path}: a tensor of shape {stored.shape} {where}; the file is damaged")
            return stored
        if isinstance(tree, StandIn):
            return self.convert(tree.content(), depth + 1)
        if isinstance(tree, Mapping):
            return {key: self.convert(value, depth + 1) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return [self.convert(value, depth + 1) for value in tree]
        return tree


def _at_rest(tensor: FakeTensor, path: Path) -> Stored:
    storage_offset = tensor.untyped_storage()._checkpoint_offset
    assert storage_offset is not None, "torch.load sets it under FakeTensorMode"
    offset = int(storage_offset + tensor.storage_offset() * tensor.dtype.itemsize)
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    return Stored(path, offset, tuple(tensor.shape), tensor.dtype, stride)
