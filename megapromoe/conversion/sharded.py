"""Safetensors in one file, or in several files with an index, `*.safetensors.index.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapromoe.conversion.stream import ConversionError, Stored, read_safetensors, without_duplicates

INDEX = ".safetensors.index.json"
_LONGEST_INDEX = 100_000_000  # bytes; about 100 per tensor


def is_index(path: Path) -> bool:
    """Whether a path has the name of an index of sharded safetensors."""
    return path.name.endswith(INDEX)


def read_tensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors (not read yet) and the metadata of a safetensors file, or of all files of an index.

    Raises ConversionError as `read_safetensors`, and unless the index lists each tensor of its files once, with the
    name of a file in its own folder.
    """
    return _read_index(path) if is_index(path) else read_safetensors(path)


def files_of(path: Path) -> list[Path]:
    """The file, or all files of an index, sorted by name."""
    return sorted({path.parent / name for name in _weight_map(path).values()}) if is_index(path) else [path]


def _weight_map(path: Path) -> Mapping[str, str]:
    bad = f"{path}: is not an index of sharded safetensors"
    try:
        if not path.is_file():
            raise ConversionError(f"{path}: there is no such file")
        if path.stat().st_size > _LONGEST_INDEX:
            raise ConversionError(f"{bad} (it has more than {_LONGEST_INDEX:,} bytes)")
        index: Any = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates)
    except OSError as problem:
        raise ConversionError(f"{path}: {problem.strerror}") from problem
    except (ValueError, RecursionError) as problem:
        raise ConversionError(f"{bad} ({problem})") from problem
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise ConversionError(f"{bad} (it has no weight_map)")
    for name, file in names.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ConversionError(
                f"{bad} (weight_map.{name} = {file!r} is not a plain name of a .safetensors file in its folder)"
            )
    return names


def _read_index(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    names = _weight_map(path)
    tensors: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for file in files_of(path):
        if not file.exists():
            raise ConversionError(f"{file}: is missing; {path.name} lists tensors in it: download it too")
        content, more = read_safetensors(file)
        metadata |= more
        for name, stored in content.items():
            if name in tensors:
                raise ConversionError(
                    f"{file}: holds {name}, which is in {tensors[name].file.name} too; download both again"
                )
            if names.get(name) != file.name:
                listed = f"lists in {names[name]}" if name in names else "does not list"
                raise ConversionError(f"{file}: holds {name}, which {path.name} {listed}; download both again")
            tensors[name] = stored
    if missing := [name for name in names if name not in tensors]:
        raise ConversionError(
            f"{path.parent / names[missing[0]]}: does not hold {missing[0]}, which {path.name} lists in it; download"
            " both again"
        )
    return {name: tensors[name] for name in names}, metadata
