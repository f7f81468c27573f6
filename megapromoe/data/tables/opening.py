"""Opens the table at a path: the format is found by the names of files, never by running anything."""

from __future__ import annotations

import glob
import re
from collections import Counter
from pathlib import Path

from megapromoe.data.images import is_hidden
from megapromoe.data.tables.arrow import DESCRIPTION, STATE, ArrowTable, saved_files
from megapromoe.data.tables.label_list import LABEL_FILE
from megapromoe.data.tables.table import IMAGES, LATENTS, Fields, Table, TableError

PARQUET, HDF5, TENSORS, TAR = ".parquet", ".hdf5", ".safetensors", ".tar"
_ENDINGS = {".parquet": PARQUET, ".h5": HDF5, ".hdf5": HDF5, ".safetensors": TENSORS, ".tar": TAR}
FORMATS = "a folder of datasets (save_to_disk), .parquet, .h5, .safetensors or .tar files"
NO_NAMES = Fields()
_SPLITS = re.compile(r"(train|training|validation|val|valid|test|dev)(?=[-_.])")
_PICKLED = (".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def is_table(path: Path) -> bool:
    """Whether a path of images is a table; otherwise it is a folder of classes."""
    if _is_pattern(path) or path.suffix.lower() in _ENDINGS:
        return True
    if not path.is_dir():
        return False
    if (path / STATE).is_file() or (path / "dataset_dict.json").is_file():
        return True
    entries = [entry for entry in path.iterdir() if not is_hidden(entry.name)]
    return any(entry.suffix.lower() in _ENDINGS for entry in entries) and not any(entry.is_dir() for entry in entries)


def open_table(path: Path, kind: str, fields: Fields = NO_NAMES) -> Table:
    """Opens a table.

    Args:
        path: a folder that `datasets` has saved; one file, or a folder or a pattern ("train-*.parquet",
            "train-{000..099}.tar") of files of one format: Parquet, HDF5, tar, and for latents safetensors; for latents
            also a folder of .npy files, see `npy_files.py`.
        kind: `table.IMAGES` or `table.LATENTS`.
        fields: names of columns or data sets.

    Raises TableError if there is nothing that can be read, naming what there is.
    """
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if (entry / STATE).is_file())
        if not splits:
            raise TableError(f"{path}: holds dataset_dict.json, but no splits; save the data set again")
        raise TableError(f"{path}: holds {len(splits)} splits of a data set; give one of them: {path / splits[0]}")
    if path.is_dir() and ((path / STATE).is_file() or (path / DESCRIPTION).is_file()):
        return ArrowTable(path, saved_files(path), kind, fields)
    if kind == LATENTS and path.is_dir() and not _files(path) and _has_npy_files(path):
        from megapromoe.data.tables.npy_files import NpyTable

        _refuse_names(fields, path)
        return NpyTable(path)
    files = _listed(path)
    formats = Counter(_ENDINGS[file.suffix.lower()] for file in files)
    if len(formats) > 1:
        listed = ", ".join(f"{count} {ending}" for ending, count in sorted(formats.items()))
        raise TableError(f"{path}: holds files of several formats ({listed}); give files of one")
    if len(splits := sorted({match[1] for file in files if (match := _SPLITS.match(file.name))})) > 1:
        example = f"{path if path.is_dir() else path.parent}/{splits[0]}*{files[0].suffix}"
        raise TableError(f"{path}: holds files of several splits ({', '.join(splits)}); give one, such as {example!r}")
    return _open(path, files, next(iter(formats)), kind, fields)


def _open(path: Path, files: list[Path], ending: str, kind: str, fields: Fields) -> Table:
    if ending == PARQUET:
        return ArrowTable(path, files, kind, fields)
    if ending == TAR:
        from megapromoe.data.tables.tar_samples import TarTable

        return TarTable(path, files, kind, fields)
    if ending == TENSORS:
        from megapromoe.data.tables.tensor_files import TensorTable

        if kind == IMAGES:
            raise TableError(f"{path}: safetensors files hold latents; give them to --latents")
        return TensorTable(path, files, fields)
    from megapromoe.data.tables.hdf5 import ArrayTable, MemberTable, has_members

    if has_members(files[0]):
        if len(files) > 1:
            raise TableError(f"{path}: {len(files)} files with {LABEL_FILE} in each; give one of them")
        _refuse_names(fields, path)
        return MemberTable(path, files[0], kind)
    if kind == IMAGES:
        raise TableError(f"{files[0]}: has no {LABEL_FILE}; of HDF5, images are read in EDM2's layout: docs/data.md")
    return ArrayTable(path, files, fields)


def _refuse_names(fields: Fields, path: Path) -> None:
    if fields != NO_NAMES:
        raise TableError(
            f"{path}: its members are named by {LABEL_FILE}; leave out --data-field, --label-field, --flip-field"
        )


def _is_pattern(path: Path) -> bool:
    return any(mark in str(path) for mark in "*?{") and not path.exists()


def _files(folder: Path) -> list[Path]:
    """The files of a known format in a folder, sorted by name; hidden ones are left out."""
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in _ENDINGS and entry.is_file() and not is_hidden(entry.name)
    )


def _has_npy_files(folder: Path) -> bool:
    return any(entry.suffix == ".npy" for entry in [*folder.glob("*.npy"), *folder.glob("*/*.npy")])


def _listed(path: Path) -> list[Path]:
    """The files of a path or pattern. Raises TableError if there are none."""
    if _is_pattern(path):
        if "{" in str(path):
            from megapromoe.data.tars import expand

            return expand(str(path))
        files = [Path(name) for name in sorted(glob.glob(str(path))) if Path(name).is_file()]
        if not files:
            raise TableError(f"{path}: no file has a name of this pattern; give existing files: {FORMATS}")
    elif path.is_dir():
        if not (files := _files(path)):
            programs = sorted(entry.name for entry in path.glob("*.py"))
            hint = f", and its program {programs[0]} is not executed" if programs else ""
            raise TableError(f"{path}: holds no files of a known format{hint}; give {FORMATS}")
    elif path.is_file():
        files = [path]
    else:
        raise TableError(f"{path}: no such file or folder; give {FORMATS}")
    if unknown := [file for file in files if file.suffix.lower() not in _ENDINGS]:
        ending = unknown[0].suffix.lower()
        reason = "is not of a known format"
        if ending in _PICKLED:
            reason = "is a pickled file, which could execute code and is not opened"
        elif ending == ".py":
            reason = "is a program, which is not executed"
        raise TableError(f"{unknown[0]}: {reason}; give {FORMATS}")
    return files
