"""Folders with a .npy file for each latent: those of fast-DiT, and those of EDM2's scripts, which REPA uses.

fast-DiT: `*_features/0.npy`, `*_labels/0.npy`. EDM2, REPA: `00000/img-mean-std-00000000.npy`, labels in `dataset.json`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np

from megapromoe.data.images import list_files
from megapromoe.data.tables.label_list import LABEL_FILE, read_labels
from megapromoe.data.tables.table import Labels, RecordError, Table, TableError


class NpyTable(Table):
    """A folder with a file for each latent.

    Args:
        folder: with `dataset.json`; or with a folder `*_features` and a folder `*_labels`.

    Raises TableError if it is of neither form, or holds no latents.
    """

    def __init__(self, folder: Path):
        self.path = folder
        paths = [path for path in list_files(folder)[0] if path.lower().endswith(".npy")]
        folders = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        features = [name for name in folders if name.endswith("_features")]
        labels = [name for name in folders if name.endswith("_labels")]
        self._labels_of: dict[str, int] | None = None
        if (folder / LABEL_FILE).is_file():
            self._labels_of = read_labels((folder / LABEL_FILE).read_bytes(), folder / LABEL_FILE)
            self._members = paths
        elif len(features) == len(labels) == 1:
            self._label_folder = folder / labels[0]
            # Names are numbers: 2.npy is before 10.npy.
            self._members = sorted(
                (path for path in paths if path.startswith(f"{features[0]}/")), key=lambda path: (len(path), path)
            )
        else:
            raise TableError(
                f"{folder}: holds neither {LABEL_FILE} nor one folder *_features and one *_labels beside its .npy"
                f' files; add {LABEL_FILE} with {{"labels": [[name, label], ...]}}'
            )
        if not self._members:
            raise TableError(f"{folder}: holds no .npy files of latents; give another folder")
        self.holds_deviations = all("mean-std" in name for name in self._members)

    def __len__(self) -> int:
        return len(self._members)

    def name(self, row: int) -> str:
        return self._members[row]

    def labels(self) -> Labels:
        if self._labels_of is not None:
            return Labels([self._labels_of.get(name) for name in self._members])
        return Labels([_label(self._label_folder / Path(name).name) for name in self._members])

    def values(self, start: int, stop: int) -> Iterator[list[bytes | np.ndarray | None]]:
        for name in self._members[start:stop]:
            array = _read(self.path / name, RecordError)
            # fast-DiT saves batches of one.
            yield [array[0] if array.ndim == 4 and len(array) == 1 else array]


def read_npy(content: bytes) -> np.ndarray:
    """The array in the content of a .npy file. Raises ValueError."""
    stream = BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        # numpy allocates the memory that a header claims before it reads the values.
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
            raise ValueError(f"it does not hold the {dtype} {shape} of its header")
        stream.seek(0)
        return np.lib.format.read_array(stream, allow_pickle=False)
    except ValueError:
        raise
    except Exception as error:  # numpy raises exceptions of many types for a damaged header
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _read(file: Path, kind: type[Exception]) -> np.ndarray:
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is not a regular file")
        return read_npy(file.read_bytes())
    except (OSError, ValueError) as error:
        raise kind(f"{file}: cannot be read as .npy: {error}; create it again") from error


def _label(file: Path) -> int | None:
    """The label in a file; None if there is no file."""
    if not file.exists():
        return None
    label = _read(file, TableError)
    if label.size != 1 or label.dtype.kind not in "iu":
        raise TableError(f"{file}: holds {label.dtype} {label.shape}, not one whole number; correct it")
    return int(label.reshape(()))
