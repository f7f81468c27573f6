"""Reads the mean and deviation of latents from files of other projects, such as VA-VAE's latents_stats.pt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from megapromoe.conversion.stream import ConversionError, Stored
from megapromoe.conversion.torch_files import read_pickle
from megapromoe.data.channel_statistics import StatisticsError

ENDINGS = (".pt", ".pth", ".safetensors", ".npz", ".json")
_LARGEST = 1 << 24  # bytes: statistics are small, also those with a value for each position


def read_statistics(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by their names.

    Args:
        path: a file of torch.save, whose pickle is not executed; safetensors; .npz; or JSON with lists of numbers.

    Raises StatisticsError if it cannot be read.
    """
    if path.suffix.lower() not in ENDINGS or not path.is_file():
        reason = "is not a file of statistics" if path.is_file() else "no such file"
        raise StatisticsError(f"--statistics {path}: {reason}; give a {', '.join(ENDINGS)} file, or compute")
    if (size := path.stat().st_size) > _LARGEST:
        raise StatisticsError(f"--statistics {path}: has {size:,} bytes, too many for statistics; give another file")
    try:
        return _arrays(path)
    except ConversionError as error:
        raise StatisticsError(f"--statistics {error}") from error
    except Exception as error:  # numpy, zipfile and safetensors raise exceptions of many types for damaged files
        reason = " ".join(str(error).split())
        raise StatisticsError(
            f"--statistics {path}: cannot be read ({reason}); give another file or compute"
        ) from error


def _arrays(path: Path) -> dict[str, np.ndarray]:
    ending = path.suffix.lower()
    if ending == ".json":
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        return {name: np.asarray(value, np.float64) for name, value in content.items() if isinstance(value, list)}
    if ending == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    if ending == ".safetensors":
        with safe_open(path, "pt") as tensors:
            return {name: _numbers(tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118, no iterator
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise ValueError("it does not hold named tensors")
    return {str(name): _numbers(value.read()) for name, value in content.items() if isinstance(value, Stored)}


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()
