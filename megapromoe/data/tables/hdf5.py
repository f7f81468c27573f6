"""HDF5 files, read through h5py: data sets of all latents and labels, or a data set for each image.

Two layouts are read. *Arrays*: one data set of latents (N, C, H, W), one of labels (N,), perhaps one of the latents of
mirror images. *Members*: a data set for each image with the name of a file (`00000/img00000000.png`, or
`00000/img-mean-std-00000000.npy`), and `dataset.json` with their labels, as REPA-E makes them from EDM2's scripts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megapromoe.data.images import SUFFIXES
from megapromoe.data.tables.label_list import LABEL_FILE, read_labels
from megapromoe.data.tables.table import (
    BLOCK,
    IMAGES,
    LATENTS,
    Fields,
    FilesTable,
    Labels,
    RecordError,
    TableError,
    chosen,
)
from megapromoe.errors import UserError


class ArrayTable(FilesTable):
    """Files with one data set of latents and one of labels.

    Args:
        path: as the user gave it.
        files: in order; with equal names of data sets.
        fields: names of the data sets, such as "train/latents".

    Raises TableError if h5py is not installed, a file cannot be opened, a data set is missing or of another form, or
    its values are in other files.
    """

    def __init__(self, path: Path, files: list[Path], fields: Fields):
        super().__init__(path, files)
        self._h5py, self.fields = _library(), fields
        self._data = self._flip = ""
        shapes: list[tuple[int, ...]] = []
        for file in self.files:
            with self._opened(file) as content:
                names = _data_set_names(self._h5py, content)
                data = chosen(fields.data, LATENTS, names, file)
                flip = chosen(fields.flip, "flip", names, file, is_needed=False)
                if shapes and (data, bool(flip)) != (self._data, bool(self._flip)):
                    raise TableError(f"{file}: has other data sets than {self.files[0]}; give files of one kind")
                self._data, self._flip = data, flip
                for name in filter(None, (data, flip)):
                    shape, kind = self._checked(content, name, file).shape, content[name].dtype.kind
                    if len(shape) < 2 or kind != "f":
                        raise TableError(
                            f"{file}: {name} is {content[name].dtype} {shape}, not floating-point (N, C, H, W); give"
                            f" {'--data-field' if name == data else '--flip-field'} NAME of the latents"
                        )
                    if name == flip and shape[0] != len(content[data]):
                        raise TableError(f"{file}: {flip} has {shape[0]:,} records, {data} {len(content[data]):,}")
                shapes.append(content[data].shape)
        self.counts, self.views = [shape[0] for shape in shapes], 1 + bool(self._flip)

    def labels(self) -> Labels:
        values: list[int | str | None] = []
        for file, count in zip(self.files, self.counts, strict=True):
            with self._opened(file) as content:
                name = chosen(self.fields.label, "label", _data_set_names(self._h5py, content), file)
                data = self._checked(content, name, file)
                if (shape := data.shape) not in ((count,), (count, 1)):
                    raise TableError(
                        f"{file}: {name} has shape {shape}, not ({count},): there must be one label for each of the"
                        f" {count:,} latents; give --label-field NAME of the labels"
                    )
                if self._h5py.check_string_dtype(data.dtype):
                    values += np.asarray(data.asstr(errors="replace")[()]).reshape(-1).tolist()
                elif data.dtype.kind in "iu":
                    values += data[()].reshape(-1).tolist()
                else:
                    raise TableError(f"{file}: {name} is {data.dtype}; labels are whole numbers or text")
        return Labels(values)

    def values(self, start: int, stop: int) -> Iterator[list[bytes | np.ndarray | None]]:
        names = [name for name in (self._data, self._flip) if name]
        for number, low, high in self.spans(start, stop):
            with self._opened(self.files[number], RecordError) as content:
                sets = [self._checked(content, name, self.files[number]) for name in names]
                for first in range(low, high, BLOCK):
                    blocks = [data[first : min(first + BLOCK, high)] for data in sets]
                    yield from (list(views) for views in zip(*blocks, strict=True))

    @contextmanager
    def _opened(self, file: Path, kind: type[Exception] = TableError) -> Iterator[Any]:
        with _opened(self._h5py, file, kind) as content:
            yield content

    def _checked(self, content: Any, name: str, file: Path) -> Any:
        return _data_set(self._h5py, content, name, file)


class MemberTable(FilesTable):
    """One file with a data set for each image or latent, named like a file, and `dataset.json` with their labels.

    Raises TableError as `ArrayTable`.
    """

    def __init__(self, path: Path, file: Path, kind: str):
        super().__init__(path, [file])
        self._h5py, self._file = _library(), file
        endings = tuple(SUFFIXES) if kind == IMAGES else (".npy",)
        self.kind = kind
        with _opened(self._h5py, file, TableError) as content:
            names = _data_set_names(self._h5py, content, endings)
            self._members = [name for name in names if name.lower().endswith(endings)]
            self._labels = read_labels(
                np.asarray(_data_set(self._h5py, content, LABEL_FILE, file)[()]).tobytes(), f"{file}: {LABEL_FILE}"
            )
        if not self._members:
            raise TableError(f"{file}: none of its {len(names):,} data sets has the name of a {'/'.join(endings)} file")
        self.counts = [len(self._members)]
        self.holds_deviations = kind == LATENTS and all("mean-std" in name for name in self._members)

    def name(self, row: int) -> str:
        return self._members[row]

    def labels(self) -> Labels:
        return Labels([self._labels.get(name) for name in self._members])

    def values(self, start: int, stop: int) -> Iterator[list[bytes | np.ndarray | None]]:
        with _opened(self._h5py, self._file, RecordError) as content:
            for name in self._members[start:stop]:
                value = _data_set(self._h5py, content, name, self._file)[()]
                if self.kind == IMAGES:
                    yield [np.asarray(value).tobytes()]
                    continue
                if value.dtype.kind != "f":
                    raise RecordError(f"{self._file}, {name}: holds {value.dtype}, not floating-point numbers")
                yield [value]


def has_members(file: Path) -> bool:
    """Whether a file is of the layout with a data set for each image. Raises TableError if it cannot be opened."""
    h5py = _library()
    with _opened(h5py, file, TableError) as content:
        return LABEL_FILE in content


def _data_set_names(h5py: Any, content: Any, endings: tuple[str, ...] = ()) -> list[str]:
    """Sorted names of all data sets of a file, groups included. Links to other files are not followed.

    Args:
        endings: names with these endings are of data sets; these are not opened, which would take long for millions.
    """
    names, visited = [], set()

    def walk(group: Any, prefix: str) -> None:
        address = h5py.h5o.get_info(group.id).addr
        if address in visited:  # a group may contain itself
            return
        visited.add(address)
        for name in group:
            is_link = not isinstance(group.get(name, getlink=True), h5py.HardLink)
            if is_link or (endings and name.lower().endswith(endings)):
                names.append(prefix + name)  # a link is refused when it is read
                continue
            entry = group[name]
            if isinstance(entry, h5py.Dataset):
                names.append(prefix + name)
            elif isinstance(entry, h5py.Group):
                walk(entry, f"{prefix}{name}/")

    walk(content, "")
    return sorted(names)


def _data_set(h5py: Any, content: Any, name: str, file: Path) -> Any:
    """A data set whose values are in this file. Raises TableError."""
    parts = name.split("/")
    links = [content.get("/".join(parts[: i + 1]), getlink=True) for i in range(len(parts))]
    if any(isinstance(link, h5py.ExternalLink) for link in links):
        raise TableError(
            f"{file}: {name} is a link to another file, which is not opened; copy the values into one file"
        )
    data = content.get(name)
    if not isinstance(data, h5py.Dataset):
        raise TableError(f"{file}: {name} is not a data set; give the name of one")
    if data.external or data.is_virtual:
        raise TableError(f"{file}: the values of {name} are in other files, which are not opened; copy them into one")
    return data


@contextmanager
def _opened(h5py: Any, file: Path, kind: type[Exception]) -> Iterator[Any]:
    """Opens a file, and turns errors of h5py into `kind` with the name of the file."""
    try:
        with h5py.File(file, "r") as content:
            yield content
    except UserError:
        raise
    except Exception as error:  # h5py raises exceptions of many types for damaged files
        reason = " ".join(str(error).split())
        raise kind(
            f"{file} cannot be read as HDF5: {reason[:200]}; it is cut off or damaged, or is compressed by a filter"
            " that h5py does not have: write it again"
        ) from error


def _library() -> Any:
    """The h5py library. Raises TableError if it is not installed."""
    try:
        import h5py
    except ImportError as error:
        raise TableError("HDF5 files need h5py: pip install 'megapromoe[data]'") from error
    return h5py
