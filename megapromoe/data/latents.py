"""Latents on disk: few large shards; each record is checked when it is read.

    DIR/manifest.json        shape, type, classes, autoencoder, shards with their SHA-256; written last
    DIR/index.safetensors    for each record: label, CRC-32, end of its name in `names`
    DIR/shard-00000.npy ...  records (N, views, parts, C, H, W) in C order; other programs can memory-map them

Views: the image and, if `mirror` is "stored", its mirror image (the latent of a mirrored image differs from the
mirrored latent; for pixels they are equal, and `mirror` is "exact"). Parts: the mean and, for stochastic latents, the
log-variance. The values are raw: `scale` and `shift` of the manifest are applied on reading. See docs/data.md.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import safe_open

from megapromoe.data.datasets import DamagedRecords, DatasetError
from megapromoe.data.shard_files import (
    HEADER,
    are_file_names,
    hashed_json,
    npy_header,
    open_shards,
    read_hashed_json,
    read_index,
)
from megapromoe.io import sha256_of_json

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST, INDEX = "manifest.json", "index.safetensors"
DTYPES = ("uint8", "float16", "float32")
MIRRORS = ("stored", "exact", "none")
_LONGEST_SIDE = 1 << 20


class LatentsError(DatasetError):
    """Latents cannot be opened, read or used as requested."""

    on_all_ranks = True  # every rank opens the same files


@dataclass(frozen=True)
class Shard:
    """A shard: file name, number of records, SHA-256 of the file."""

    file: str
    records: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The description of a folder of latents; see the module's docstring."""

    format: int
    shape: tuple[int, int, int]
    dtype: str
    mirror: str
    stochastic: bool
    class_names: tuple[str, ...]
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    autoencoder: dict[str, str]
    resolution: int
    crop: str
    rounding: float | None
    """RMS error of the stored mean divided by the RMS standard deviation of the posterior; None without a posterior."""
    index_sha256: str
    shards: tuple[Shard, ...]
    skipped: tuple[tuple[str, str], ...]

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)

    @property
    def record_shape(self) -> tuple[int, ...]:
        """(views, parts, C, H, W)."""
        return 1 + (self.mirror == "stored"), 1 + self.stochastic, *self.shape

    @property
    def record_bytes(self) -> int:
        return int(np.prod(self.record_shape)) * np.dtype(self.dtype).itemsize

    @property
    def identity(self) -> str:
        """SHA-256 of the manifest, which contains the hashes of all files: identifies the data set."""
        return sha256_of_json(asdict(self))

    def to_json(self) -> str:
        """The manifest as JSON, with its identity as `sha256`."""
        return hashed_json(self)


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a folder of latents; raises LatentsError if it is missing or invalid.

    Manifests of older versions have no hash; they are read, and a log message says so.
    """
    folder = Path(folder)

    def convert(content: dict[str, Any]) -> Manifest:
        content |= {name: tuple(content[name]) for name in ("shape", "class_names", "scale", "shift")}
        content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
        content["skipped"] = tuple(tuple(pair) for pair in content["skipped"])
        return Manifest(**content)

    def missing() -> str:
        remedy = "create it with megapromoe encode"
        if (folder / "text.json").exists():
            remedy = "it holds text features alone: give the folder of the latents"
        elif (folder / "plan.json").exists():
            remedy = "its encoding is not finished: repeat megapromoe encode"
        return f"{folder} holds no {MANIFEST}; {remedy}"

    path, error = folder / MANIFEST, LatentsError
    return read_hashed_json(path, Manifest, FORMAT, convert, _form_problems, missing, error, has_unhashed_versions=True)


def _form_problems(m: Manifest) -> Iterator[str]:
    """A message for each field that is not valid in this format."""
    if len(m.shape) != 3 or not all(type(n) is int and 0 < n <= _LONGEST_SIDE for n in m.shape):
        yield f"shape {m.shape} is not three whole numbers, 1 to {_LONGEST_SIDE}"
    if m.dtype not in DTYPES or m.mirror not in MIRRORS or type(m.stochastic) is not bool:
        yield f"dtype {m.dtype!r}, mirror {m.mirror!r} or stochastic {m.stochastic!r} is not valid"
    for name, values in (("scale", m.scale), ("shift", m.shift)):
        if len(values) != m.shape[0] or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
            yield f"{name} is not a finite number for each of {m.shape[0]} channels"
    if not all(isinstance(name, str) for name in (*m.class_names, *(text for pair in m.skipped for text in pair))):
        yield "class_names or skipped are not text"
    if not isinstance(m.autoencoder, dict) or type(m.resolution) is not int or not isinstance(m.index_sha256, str):
        yield "autoencoder, resolution or index_sha256 are not of this format"
    if m.rounding is not None and type(m.rounding) not in (int, float):
        yield "rounding is not a number"
    if not are_file_names(shard.file for shard in m.shards):
        yield "shards are not different files of this folder"
    if not all(type(shard.records) is int and 0 <= shard.records < 1 << 48 for shard in m.shards):
        yield "the number of records of a shard is not a whole number"


class Latents:
    """A folder of latents as a data set; see `datasets.Dataset`.

    Records are read with pread and not through a memory map, because a failing disk would end the process with SIGBUS.

    Args:
        folder: folder of the latents.
        cache: folder with copies of some or all shards; a record that is damaged in it is read from `folder`.
        verify: compare each record with its checksum when it is read.

    Raises LatentsError, which lists every file that is missing, damaged or has a wrong size.
    """

    def __init__(self, folder: str | Path, cache: str | Path | None = None, verify: bool = True):
        self.folder, self.verify = Path(folder), verify
        self.manifest = m = read_manifest(self.folder)
        self.shape, self.num_classes, self.class_names = m.shape, len(m.class_names), m.class_names
        self.stochastic = m.stochastic
        index = read_index(
            self.folder / INDEX, m.index_sha256, ("labels", "crc32", "name_ends"), m.records, LatentsError
        )
        self.labels = index["labels"].astype(np.int64)
        self._crc32, self._name_ends = index["crc32"], index["name_ends"]
        self._first = np.concatenate([[0], np.cumsum([shard.records for shard in m.shards])])
        self._scale, self._shift = (np.asarray(v, np.float32)[:, None, None] for v in (m.scale, m.shift))
        self._damaged: set[int] = set()
        self._files = _open(self.folder, m, m.shards)
        self._copies: dict[str, BinaryIO] = {}
        if cache is not None:
            cached = [shard for shard in m.shards if (Path(cache) / shard.file).exists()]
            self._copies = dict(zip((s.file for s in cached), _open(Path(cache), m, cached), strict=True))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads scaled means (B, C, H, W) float32 and labels (B,) int64."""
        return self.sample(indices_B, np.zeros(len(indices_B), dtype=bool), None), self.labels[indices_B]

    def sample(self, indices_B: np.ndarray, mirror_B: np.ndarray, normal_BCHW: np.ndarray | None) -> np.ndarray:
        """Scaled latents (B, C, H, W) float32; see `datasets.Dataset`."""
        m = self.manifest
        if m.mirror == "none" and mirror_B.any():
            raise LatentsError(
                f"{self.folder} holds no mirrored latents; set data.flip=false, or encode images together with"
                " their mirror images"
            )
        raw_BPCHW = np.empty((len(indices_B), *m.record_shape[1:]), dtype=m.dtype)
        damaged = {}
        for row, (index, mirror) in enumerate(zip(indices_B.tolist(), mirror_B.tolist(), strict=True)):
            record, problem = self._record(index)
            if record is None:
                damaged[row] = problem
            else:
                raw_BPCHW[row] = record[int(mirror and m.mirror == "stored")]
                if mirror and m.mirror == "exact":
                    raw_BPCHW[row] = raw_BPCHW[row][..., ::-1].copy()
        if damaged:
            raise DamagedRecords(list(damaged), "; ".join(damaged.values()))
        values_BCHW = raw_BPCHW[:, 0].astype(np.float32)
        if m.stochastic and normal_BCHW is not None:
            values_BCHW += np.exp(0.5 * raw_BPCHW[:, 1].astype(np.float32)) * normal_BCHW
        return (values_BCHW - self._shift) * self._scale

    def raw(self, index: int) -> np.ndarray:
        """A record as stored, (views, parts, C, H, W); raises LatentsError if it is damaged."""
        record, problem = self._record(index)
        if record is None:
            raise LatentsError(problem)
        return record

    def name(self, index: int) -> str:
        """Path of the source file of a record, relative to the folder of the source."""
        start = int(self._name_ends[index - 1]) if index else 0
        with safe_open(self.folder / INDEX, "np") as file:
            return os.fsdecode(bytes(file.get_slice("names")[start : int(self._name_ends[index])]))

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the shard that holds a record, and the record's position in it."""
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return number, index - int(self._first[number])

    def _record(self, index: int) -> tuple[np.ndarray | None, str]:
        """A record and "", or None and a message."""
        number, place = self.locate(index)
        shard, size = self.manifest.shards[number], self.manifest.record_bytes
        copy = self._copies.get(shard.file)
        for file in (self._files[number],) if copy is None else (copy, self._files[number]):
            try:
                data = os.pread(file.fileno(), size, HEADER + place * size)
            except OSError as error:
                # Not skipped like a record with a wrong checksum: all ranks must skip the same records, and another
                # rank may be able to read this one.
                raise UnreadableError(f"{file.name}, record {place}: {error.strerror}; check its disk") from error
            if len(data) == size and not (self.verify and zlib.crc32(data) != self._crc32[index]):
                return np.frombuffer(data, self.manifest.dtype).reshape(self.manifest.record_shape), ""
            if index not in self._damaged:
                self._damaged.add(index)
                logger.warning("%s, record %d (%s) is damaged", file.name, place, self.name(index))
        return None, f"{self.folder / shard.file}, record {place} is damaged: wrong checksum"


class UnreadableError(LatentsError):
    """A shard cannot be read, possibly on this rank only."""

    on_all_ranks = False


def _open(folder: Path, m: Manifest, shards: Sequence[Shard]) -> list[BinaryIO]:
    """Opens shards in a folder; raises LatentsError."""
    return open_shards({folder / shard.file: shard.records * m.record_bytes for shard in shards}, LatentsError)


def check(folder: Path, progress: Callable[[int], Any] | None = None) -> list[str]:
    """Reads all shards and lists every problem: SHA-256, checksums, headers, values that are not finite, labels.

    Args:
        folder: folder of the latents.
        progress: called with the number of bytes of each record that was read.

    Raises LatentsError if the folder cannot be opened.
    """
    data, problems = Latents(folder), []
    m = data.manifest
    outside = np.flatnonzero((data.labels < 0) | (data.labels >= data.num_classes))
    if len(outside):
        problems.append(f"record {outside[0]} has label {data.labels[outside[0]]}, not in 0..{data.num_classes - 1}")
    for label in np.flatnonzero(np.bincount(data.labels[data.labels >= 0], minlength=data.num_classes) == 0):
        problems.append(f"class {m.class_names[label]!r} has no record")
    index = 0
    for shard in m.shards:
        path, digest, before = data.folder / shard.file, hashlib.sha256(), len(problems)
        with open(path, "rb") as file:
            header = file.read(HEADER)
            digest.update(header)
            if header != npy_header((shard.records, *m.record_shape), m.dtype):
                problems.append(f"{path}: its header is not that of {shard.records} records")
            for place in range(shard.records):
                block = file.read(m.record_bytes)
                digest.update(block)
                if zlib.crc32(block) != data._crc32[index]:
                    problems.append(f"{path}, record {place} ({data.name(index)}): wrong checksum")
                elif not np.isfinite(np.frombuffer(block, m.dtype)).all():
                    problems.append(f"{path}, record {place} ({data.name(index)}): not finite")
                index += 1
                if progress:
                    progress(len(block))
        if digest.hexdigest() != shard.sha256 and len(problems) == before:
            problems.append(f"{path}: its SHA-256 differs from that in the manifest")
    return problems


def scaled_deviation(folder: Path, records: int = 1024) -> tuple[float, int]:
    """The standard deviation of the scaled latents, from at most `records` evenly spaced records.

    Returns the deviation and the number of records; damaged ones are skipped. Raises LatentsError if the folder cannot
    be opened.
    """
    data = Latents(folder)
    count, total, squares, used = 0, 0.0, 0.0, 0
    for index in np.unique(np.linspace(0, len(data) - 1, min(records, len(data))).astype(np.int64)):
        try:
            values = data.read(np.array([index]))[0].astype(np.float64)
        except DamagedRecords:
            continue
        count, total, squares = count + values.size, total + values.sum(), squares + np.square(values).sum()
        used += 1
    return math.sqrt(max(0.0, squares / count - (total / count) ** 2)) if count else math.nan, used
