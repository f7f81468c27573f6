"""Writes text features of captions; see `text_features.py` for the format and `shard_job.py` for the job."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from megapromoe.data import latents
from megapromoe.data.captions import CaptionedItem
from megapromoe.data.shard_files import npy_header
from megapromoe.data.shard_job import SHARD_SIZE, EncodeError, ShardJob, run_job
from megapromoe.data.text_encoder import TextEncoder, check_same_encoder
from megapromoe.data.text_features import (
    FORMAT,
    INDEX,
    MANIFEST,
    STORED,
    TextFeatures,
    TextManifest,
    TextShard,
    encoded,
    read_text_manifest,
)
from megapromoe.distributed import watchdog
from megapromoe.io import atomic_write, sha256_of, write_bytes, write_text

logger = logging.getLogger(__name__)

WINDOW = 16  # batches that are sorted by length, so that little is padded


class TextJob(ShardJob):
    """Writes the text features of captions.

    Args:
        items: the captions; those of `beside` too whose images could not be read.
        encoder: of the captions.
        folder: of the text features.
        dtype: "float16" or "bfloat16".
        batch: captions that are encoded at once.
        shard_size: captions of a shard.
        beside: the folder of the latents of the same items, which is complete when `merge` is called; None for
            captions alone.
        skipped: place and reason of captions that were left out.
    """

    inputs, manifest_file = "captions", MANIFEST
    part_keys = frozenset(("sha256", "first", "rows", "crc32", "cut", "shard_rows"))

    def __init__(
        self,
        items: Sequence[CaptionedItem],
        encoder: TextEncoder,
        folder: Path,
        dtype: str = "float16",
        batch: int = 64,
        shard_size: int = SHARD_SIZE,
        beside: Path | None = None,
        skipped: tuple[tuple[str, str], ...] = (),
    ):
        super().__init__(folder, len(items), shard_size)
        self.items, self.encoder, self.dtype, self.batch = items, encoder, dtype, batch
        self.beside, self.skipped = beside, skipped

    def summary(self) -> str:
        """What will be written, in one line."""
        kind, tokens = self.encoder.identity["kind"], self.encoder.max_tokens
        return (
            f"{self.num_items:,} captions -> text features of width {self.encoder.width}, {self.dtype}, by a {kind},"
            f" at most {tokens} tokens, in {self.shards} shards"
        )

    def plan(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(f"{item.path}\0{item.caption}\n".encode(errors="surrogateescape"))
        plan = {"format": FORMAT, "captions": len(self.items), "captions_sha256": digest.hexdigest()}
        plan |= {"dtype": self.dtype, "width": self.encoder.width, "max_tokens": self.encoder.max_tokens}
        plan |= {"batch": self.batch, "shard_size": self.shard_size, "with_latents": self.beside is not None}
        # By its hashes: the same encoder may lie in another folder when the command is repeated.
        return plan | {f"encoder_{key}": value for key, value in self.encoder.identity.items() if key != "name"}

    def shard_name(self, number: int) -> str:
        return f"text-{number:05d}.npy"

    def write_shard(self, number: int, progress: Callable[[int], Any]) -> dict[str, Any]:
        """Encodes the different captions of a shard once each, in the order of their first use."""
        items = [self.items[i] for i in self.items_of_shard(number)]
        captions = list(dict.fromkeys(item.caption for item in items))
        path, stored = self.folder / self.shard_name(number), STORED[self.dtype]
        places: dict[str, tuple[int, int, int, bool]] = {}  # caption -> first row, rows, CRC-32, whether it is cut
        rows, done = 0, 0
        with atomic_write(path) as file:
            file.seek(len(npy_header((0, self.encoder.width), stored)))
            for start in range(0, len(captions), WINDOW * self.batch):
                window = captions[start : start + WINDOW * self.batch]
                features = self._encode(window)
                for caption in window:
                    values, cut = features[caption]
                    data = encoded(values, self.dtype)
                    self._check_finite(caption, values, data)
                    content = data.tobytes()
                    file.write(content)
                    places[caption] = rows, len(values), zlib.crc32(content), cut
                    rows += len(values)
                now = len(items) * min(start + len(window), len(captions)) // len(captions)
                progress(now - done)
                done = now
            file.seek(0)
            file.write(npy_header((rows, self.encoder.width), stored))
        columns = zip(*(places[item.caption] for item in items), strict=True)
        part = dict(zip(("first", "rows", "crc32", "cut"), map(list, columns), strict=True))
        return part | {"sha256": sha256_of(path), "shard_rows": rows}

    def _encode(self, captions: Sequence[str]) -> dict[str, tuple[np.ndarray, bool]]:
        """Features of captions, in batches of similar lengths, and whether they were cut."""
        ordered = sorted(captions, key=lambda caption: (len(caption), caption))
        results: dict[str, tuple[np.ndarray, bool]] = {}
        for start in range(0, len(ordered), self.batch):
            batch = ordered[start : start + self.batch]
            results |= dict(zip(batch, zip(*self.encoder.encode(batch), strict=True), strict=True))
            watchdog.touch()
        return results

    def _check_finite(self, caption: str, values: np.ndarray, data: np.ndarray) -> None:
        """Raises EncodeError if a feature is not finite as it is stored."""
        if values.shape[1] != self.encoder.width:
            raise EncodeError(
                f"caption {_short(caption)}: its features have width {values.shape[1]}, the encoder's configuration"
                f" gives {self.encoder.width}; check the encoder"
            )
        if not np.isfinite(values).all():
            raise EncodeError(f"caption {_short(caption)}: its features are not finite; check the encoder")
        if self.dtype == "float16" and not np.isfinite(data).all():
            raise EncodeError(
                f"caption {_short(caption)}: its features are beyond float16; store as bfloat16 (--text-dtype bfloat16)"
            )

    def merge(self, parts: list[dict[str, Any]]) -> None:
        shard = np.repeat(np.arange(len(parts)), [len(part["rows"]) for part in parts])
        first, rows, crc32, cut = (
            np.array([value for part in parts for value in part[key]], dtype=kind)
            for key, kind in (("first", np.int64), ("rows", np.int32), ("crc32", np.uint32), ("cut", bool))
        )
        kept, latents_sha256 = self._records()
        captions = [self.items[index].caption.encode() for index in kept]
        data = save({
            "shard": shard[kept].astype(np.int32),
            "first": first[kept],
            "rows": rows[kept],
            "crc32": crc32[kept],
            "captions": np.frombuffer(b"".join(captions), np.uint8),
            "caption_ends": np.cumsum([len(caption) for caption in captions]),
        })  # fmt: skip
        write_bytes(self.folder / INDEX, data)
        manifest = TextManifest(
            format=FORMAT,
            width=self.encoder.width,
            dtype=self.dtype,
            encoder=self.encoder.identity,
            max_tokens=self.encoder.max_tokens,
            records=len(kept),
            cut=int(cut[kept].sum()),
            latents_sha256=latents_sha256,
            index_sha256=hashlib.sha256(data).hexdigest(),
            shards=tuple(
                TextShard(self.shard_name(number), part["shard_rows"], part["sha256"])
                for number, part in enumerate(parts)
            ),
            skipped=self.skipped,
        )
        write_text(self.folder / MANIFEST, manifest.to_json())

    def _records(self) -> tuple[list[int], str]:
        """The items that are records, in order, and the identity of the latents beside them."""
        if self.beside is None:
            return list(range(len(self.items))), ""
        manifest = latents.read_manifest(self.beside)
        left_out = {path for path, _ in manifest.skipped}
        kept = [index for index, item in enumerate(self.items) if item.path not in left_out]
        with safe_open(self.beside / latents.INDEX, "np") as file:
            names = file.get_tensor("names").tobytes()
        if names != b"".join(os.fsencode(self.items[index].path) for index in kept):
            raise EncodeError(f"{self.beside} holds latents of other images; encode into a new folder")
        return kept, manifest.identity


def encode_text(
    job: TextJob,
    rank: int = 0,
    world: int = 1,
    wait_timeout: float = 3600.0,
    progress: Callable[[int], Any] | None = None,
) -> TextManifest | None:
    """Writes text features, or resumes an interrupted job; see `shard_job.run_job`. All ranks call it.

    Returns the manifest on rank 0, None on other ranks.
    """
    run_job(job, rank, world, wait_timeout, progress)
    return read_text_manifest(job.folder) if rank == 0 else None


def largest_difference(data: TextFeatures, encoder: TextEncoder, captions: int = 64) -> tuple[float, int]:
    """Encodes evenly spaced captions again.

    Returns the largest difference of a feature from the stored one, relative to the largest feature, and the number of
    captions. Raises TextEncoderError for another encoder than that of the manifest.
    """
    check_same_encoder(data.manifest.encoder, encoder)
    difference, largest = 0.0, 0.0
    indices = np.unique(np.linspace(0, len(data) - 1, min(captions, len(data))).astype(np.int64)).tolist()
    for index in indices:
        (again,), _ = encoder.encode([data.caption(index)])
        stored = data.features(index)
        if stored.shape != again.shape:
            return math.inf, len(indices)
        difference, largest = max(difference, np.abs(stored - again).max()), max(largest, np.abs(stored).max())
    return float(difference / largest) if largest else 0.0, len(indices)


def _short(caption: str) -> str:
    return repr(caption if len(caption) <= 60 else caption[:57] + "...")
