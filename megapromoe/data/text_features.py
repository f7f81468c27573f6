"""Text features on disk: one feature for each token of each caption; each record is checked when it is read.

    DIR/text.json             width, type, encoder, longest caption, shards with their SHA-256; written last
    DIR/text.safetensors      for each record: shard, first row, rows, CRC-32, end of its caption in `captions`
    DIR/text-00000.npy ...    rows (tokens, D) in C order; bfloat16 is stored as the uint16 of its bits

Beside latents, DIR is the folder `text` in that of the latents, and record i belongs to record i of the latents. Equal
captions of a shard are stored once. See docs/data.md.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from megapromoe.io import sha256_of, sha256_of_json

FORMAT = 1
FOLDER = "text"  # in a folder of latents
MANIFEST, INDEX = "text.json", "text.safetensors"
STORED = {"float16": "float16", "bfloat16": "uint16"}  # numpy's type in the files
_WIDEST = 1 << 20
_COLUMNS = ("shard", "first", "rows", "crc32", "caption_ends")


class TextFeaturesError(DatasetError):
    """Text features cannot be opened or used as requested."""

    on_all_ranks = True  # every rank opens the same files


class UnreadableText(TextFeaturesError):
    """A shard cannot be read, possibly on this rank only."""

    on_all_ranks = False


@dataclass(frozen=True)
class TextShard:
    """A shard: file name, number of tokens, SHA-256 of the file."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class TextManifest:
    """The description of a folder of text features; see the module's docstring."""

    format: int
    width: int
    dtype: str
    encoder: dict[str, str]
    """Name, kind, SHA-256 of weights and tokenizer; see `text_encoder.TextEncoder`."""
    max_tokens: int
    records: int
    cut: int
    """Number of captions that were longer than `max_tokens`."""
    latents_sha256: str
    """Identity of the manifest of the latents beside which the features are; "" for captions alone."""
    index_sha256: str
    shards: tuple[TextShard, ...]
    skipped: tuple[tuple[str, str], ...]
    """Place and reason of captions that were left out."""

    @property
    def row_bytes(self) -> int:
        """Bytes of the feature of a token."""
        return 2 * self.width

    @property
    def identity(self) -> str:
        """SHA-256 of the manifest, which contains the hashes of all files: identifies the data set."""
        return sha256_of_json(asdict(self))

    def to_json(self) -> str:
        """The manifest as JSON, with its identity as `sha256`."""
        return hashed_json(self)


def text_folder(folder: Path) -> Path | None:
    """Where the text features of a folder are: beside its latents, or in itself; None if it has none."""
    return next((path for path in (Path(folder) / FOLDER, Path(folder)) if (path / MANIFEST).exists()), None)


def read_text_manifest(folder: Path) -> TextManifest:
    """Reads the manifest of a folder of text features; raises TextFeaturesError if it is missing or invalid."""

    def convert(content: dict[str, Any]) -> TextManifest:
        content["shards"] = tuple(TextShard(**shard) for shard in content["shards"])
        content["skipped"] = tuple(tuple(pair) for pair in content["skipped"])
        return TextManifest(**content)

    def missing() -> str:
        return f"{folder} holds no {MANIFEST}; create it with megapromoe encode --captions, or repeat that command"

    path, error = Path(folder) / MANIFEST, TextFeaturesError
    return read_hashed_json(path, TextManifest, FORMAT, convert, _form_problems, missing, error)


def _form_problems(m: TextManifest) -> Iterator[str]:
    """A message for each field that is not valid in this format."""
    for name, value, least, most in (
        ("width", m.width, 1, _WIDEST),
        ("max_tokens", m.max_tokens, 1, _WIDEST),
        ("records", m.records, 0, 1 << 48),
        ("cut", m.cut, 0, 1 << 48),
        *(("the number of rows of a shard", shard.rows, 0, 1 << 48) for shard in m.shards),
    ):
        if type(value) is not int or not least <= value <= most:
            yield f"{name} {value!r} is not a whole number, {least} to {most}"
    if m.dtype not in STORED:
        yield f"dtype {m.dtype!r} is not one of {', '.join(STORED)}"
    if not isinstance(m.encoder, dict) or not isinstance(m.index_sha256, str) or not isinstance(m.latents_sha256, str):
        yield "encoder, index_sha256 or latents_sha256 are not of this format"
    if not are_file_names(shard.file for shard in m.shards):
        yield "shards are not different files of this folder"


class TextFeatures:
    """Captions and their features, by record.

    Records are read with pread and not through a memory map, because a failing disk would end the process with SIGBUS.

    Args:
        folder: folder of the text features.
        verify: compare each record with its checksum when it is read.

    Raises TextFeaturesError, which lists every file that is missing, damaged or has a wrong size.
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self.folder, self.verify = Path(folder), verify
        self.manifest = m = read_text_manifest(self.folder)
        self.width = m.width
        self._columns = read_index(self.folder / INDEX, m.index_sha256, _COLUMNS, m.records, TextFeaturesError)
        sizes = {self.folder / shard.file: shard.rows * m.row_bytes for shard in m.shards}
        self._files = open_shards(sizes, TextFeaturesError)

    def __len__(self) -> int:
        return self.manifest.records

    @property
    def tokens(self) -> np.ndarray:
        """Number of tokens of every record, int64 (records,)."""
        return self._columns["rows"].astype(np.int64)

    def caption(self, index: int) -> str:
        """The caption of a record."""
        ends = self._columns["caption_ends"]
        with safe_open(self.folder / INDEX, "np") as file:
            return bytes(file.get_slice("captions")[int(ends[index - 1]) if index else 0 : int(ends[index])]).decode()

    def features(self, index: int) -> np.ndarray:
        """The features of a record, float32 (N, D), N tokens; raises as `stored`."""
        return decoded(self.stored(index), self.manifest.dtype)

    def stored(self, index: int) -> np.ndarray:
        """The features of a record as they are stored, (N, D): float16, or uint16 with the bits of bfloat16.

        Raises DamagedRecords if its checksum is wrong, UnreadableText if its file cannot be read.
        """
        shard, first, rows, crc32 = (int(self._columns[name][index]) for name in ("shard", "first", "rows", "crc32"))
        file, size = self._files[shard], rows * self.manifest.row_bytes
        try:
            data = os.pread(file.fileno(), size, HEADER + first * self.manifest.row_bytes)
        except OSError as error:
            raise UnreadableText(f"{file.name}, record {index}: {error.strerror}; check its disk") from error
        if len(data) != size or (self.verify and zlib.crc32(data) != crc32):
            raise DamagedRecords([0], f"{file.name}, record {index} is damaged: wrong checksum")
        return np.frombuffer(data, STORED[self.manifest.dtype]).reshape(rows, self.width)


def encoded(features: np.ndarray, dtype: str) -> np.ndarray:
    """Features float32 as they are stored: rounded to float16, or the bits of bfloat16, rounded to even."""
    if dtype == "float16":
        with np.errstate(over="ignore"):  # the encoding job refuses what is not finite
            return features.astype(np.float16)
    bits = np.ascontiguousarray(features, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(features), 0x7FC0, rounded).astype(np.uint16)


def decoded(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Stored features as float32."""
    return stored.astype(np.float32) if dtype == "float16" else (stored.astype(np.uint32) << 16).view(np.float32)


def check_text(folder: Path, progress: Callable[[int], Any] | None = None) -> list[str]:
    """Reads all text features and lists every problem: SHA-256, headers, checksums, values that are not finite.

    Args:
        folder: folder of the text features.
        progress: called with the number of bytes of each shard that was read.

    Raises TextFeaturesError if the folder cannot be opened.
    """
    data, problems = TextFeatures(folder), []
    for shard in data.manifest.shards:
        path = data.folder / shard.file
        with open(path, "rb") as file:
            header = file.read(HEADER)
        if header != npy_header((shard.rows, data.width), STORED[data.manifest.dtype]):
            problems.append(f"{path}: its header is not that of {shard.rows} tokens")
        if sha256_of(path) != shard.sha256:
            problems.append(f"{path}: its SHA-256 differs from that in the manifest")
        if progress:
            progress(HEADER + shard.rows * data.manifest.row_bytes)
    for index in range(len(data)):
        try:
            if not np.isfinite(data.features(index)).all():
                problems.append(f"{data.folder}, record {index} ({data.caption(index)!r}): not finite")
        except DamagedRecords as error:
            problems.append(str(error))
    return problems


def text_bytes(m: TextManifest) -> int:
    """Bytes of all shards."""
    return sum(HEADER + shard.rows * m.row_bytes for shard in m.shards)
