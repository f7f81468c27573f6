"""The encoding job: many ranks write the records of images (or of another `Source`) into latent shards.

`shard_job.py` divides the work and resumes it. Source files that cannot be read are skipped and listed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.numpy import save

from megapromoe.data.autoencoder import Encoder
from megapromoe.data.channel_statistics import ChannelSums
from megapromoe.data.images import ImageError, Item, Scan, read_image
from megapromoe.data.latents import FORMAT, INDEX, MANIFEST, Manifest, Shard, read_manifest
from megapromoe.data.shard_files import npy_header
from megapromoe.data.shard_job import SHARD_SIZE, EncodeError, ShardJob, discard, run_job
from megapromoe.distributed import watchdog
from megapromoe.io import atomic_write, sha256_of, write_bytes, write_text

logger = logging.getLogger(__name__)

COMPUTED = "computed from these latents"
SUMS = "channel_sums"  # key of a part if the normalisation is computed
PART_KEYS = frozenset(("sha256", "labels", "crc32", "names", "skipped", "error_squares", "noise_squares"))


class Source(Protocol):
    """A source of latent records."""

    scan: Scan
    manifest_fields: dict[str, Any]
    """Fields of the `Manifest`: shape, dtype, mirror, stochastic, scale, shift, autoencoder, resolution, crop."""

    def records(self, items: Sequence[Item]) -> Iterator[tuple[Item, np.ndarray | None, str]]:
        """Yields for each item, in order: the item, its raw record float32 (views, parts, C, H, W), and "".

        For an item that cannot be read the record is None, and the text gives the reason.
        """


class EncodedImages:
    """Encodes images with an autoencoder: the posterior of each image and of its mirror image.

    Args:
        folder: folder of the images.
        scan: the images in it.
        autoencoder: see `autoencoder.open_autoencoder`.
        resolution: side of the cropped images, in pixels.
        batch: images per call of the autoencoder.
        workers: threads that read images while the autoencoder runs.
        dtype: type of the stored latents, "float16" or "float32"; pixels are stored as uint8.
        mirror: encode mirror images too.
        open_item: the file of an item, or its content; default: the file `folder` / path.
        stream: the content of each of consecutive items, in order, instead of `open_item`; None for an item without.
    """

    def __init__(
        self,
        folder: Path,
        scan: Scan,
        autoencoder: Encoder,
        resolution: int,
        batch: int = 32,
        workers: int = 1,
        dtype: str = "float16",
        mirror: bool = True,
        open_item: Callable[[Item], Path | BytesIO] | None = None,
        stream: Callable[[Sequence[Item]], Iterator[bytes | None]] | None = None,
    ):
        self.scan, self.autoencoder, self.mirror = scan, autoencoder, mirror
        self._open = open_item or (lambda item: Path(folder) / item.path)
        self._stream = stream
        self.batch, self.workers, self.pixels = batch, workers, autoencoder.identity["kind"] == "pixels"
        self.manifest_fields: dict[str, Any] = {
            "shape": autoencoder.latent_shape(resolution),
            "dtype": "uint8" if self.pixels else dtype,
            "mirror": "none" if not mirror else "exact" if self.pixels else "stored",
            "stochastic": autoencoder.stochastic,
            "scale": autoencoder.scale,
            "shift": autoencoder.shift,
            "autoencoder": autoencoder.identity,
            "resolution": resolution,
            "crop": "adm centre crop",
        }

    def by(self, encoder: Encoder) -> EncodedImages:
        """The same images, with mirror images if these have some, by another encoder; stored as float16."""
        how = (self.manifest_fields["resolution"], self.batch, self.workers)
        return EncodedImages(
            Path(), self.scan, encoder, *how, mirror=self.mirror, open_item=self._open, stream=self._stream
        )

    def records(self, items: Sequence[Item]) -> Iterator[tuple[Item, np.ndarray | None, str]]:
        """See `Source.records`."""
        # Batches do not cross shards: the last bits of an autoencoder's output may depend on the batch size.
        batches = [items[i : i + self.batch] for i in range(0, len(items), self.batch)]
        openers = self._openers(items)
        with ThreadPoolExecutor(self.workers, thread_name_prefix="images") as pool:
            ahead = [pool.submit(self._read, opener) for opener in islice(openers, self.batch)]
            for batch in batches:
                images = [future.result() for future in ahead]
                ahead = [pool.submit(self._read, opener) for opener in islice(openers, self.batch)]
                good = [image for image in images if not isinstance(image, str)]
                encoded = iter(self._encode(np.stack(good))) if good else iter(())
                for item, image in zip(batch, images, strict=True):
                    yield (item, None, image) if isinstance(image, str) else (item, next(encoded), "")

    def _openers(self, items: Sequence[Item]) -> Iterator[Callable[[], Path | BytesIO]]:
        """A function for each item that returns its file or content; called in threads."""
        if self._stream is None:
            return (partial(self._open, item) for item in items)
        return (partial(_in_memory, content) for content in self._stream(items))

    def _read(self, opener: Callable[[], Path | BytesIO]) -> np.ndarray | str:
        try:
            return read_image(opener(), self.manifest_fields["resolution"], self.autoencoder.channels)
        except ImageError as error:
            return str(error)

    def _encode(self, images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(images).float() / 127.5 - 1
        views = []
        for view in (x,) if self.pixels or not self.mirror else (x, x.flip(-1)):
            parts = [part for part in self.autoencoder.encode(view) if part is not None]
            views.append(torch.stack(parts, dim=1))
        return torch.stack(views, dim=1).cpu().numpy()


def _in_memory(content: bytes | None) -> BytesIO:
    if content is None:
        raise ImageError("holds no image")
    return BytesIO(content)


def encode(
    source: Source,
    folder: Path,
    rank: int = 0,
    world: int = 1,
    shard_size: int = SHARD_SIZE,
    wait_timeout: float = 3600.0,
    progress: Callable[[int], Any] | None = None,
    normalises: bool = False,
) -> Manifest | None:
    """Writes the latents of `source` into `folder`, or resumes an interrupted job. All ranks call it.

    Args:
        source: the records.
        folder: of the latents; shared by all ranks.
        rank, world: this rank and the number of ranks.
        shard_size: files of the source per shard.
        wait_timeout: seconds without a newly finished shard after which rank 0 stops waiting for other ranks.
        progress: called with the number of newly finished files: on rank 0 of all ranks, elsewhere of this rank.
        normalises: compute mean and deviation of each channel over all records; the manifest gets the scale and shift
            that make them 0 and `scale` of the source's fields.

    Returns:
        The manifest on rank 0, None on other ranks.

    Raises:
        EncodeError: the folder holds other files or latents of another source, a record is not finite, or a rank is
            missing.
        ImageError: no file of the source can be read.
    """
    job = LatentsJob(source, folder, shard_size, normalises)
    run_job(job, rank, world, wait_timeout, progress)
    return read_manifest(job.folder) if rank == 0 else None


class LatentsJob(ShardJob):
    """Writes the latents of a source."""

    inputs, manifest_file = "images", MANIFEST

    def __init__(self, source: Source, folder: Path, shard_size: int = SHARD_SIZE, normalises: bool = False):
        super().__init__(folder, len(source.scan.items), shard_size)
        self.source, self.normalises = source, normalises
        self.part_keys = PART_KEYS | ({SUMS} if normalises else frozenset())

    def plan(self) -> dict[str, Any]:
        return _plan(self.source, self.shard_size) | ({"normalisation": COMPUTED} if self.normalises else {})

    def shard_name(self, number: int) -> str:
        return _shard_name(number)

    def write_shard(self, number: int, progress: Callable[[int], Any]) -> dict[str, Any]:
        numbers = self.items_of_shard(number)
        items = self.source.scan.items[numbers.start : numbers.stop]
        return _write_shard(self.source, self.folder, number, items, progress, self.normalises)

    def merge(self, parts: list[dict[str, Any]]) -> None:
        if not any(part["labels"] for part in parts):
            discard(self)
            path, reason = parts[-1]["skipped"][-1]
            raise ImageError(f"none of {self.num_items} files could be read; {path}: {reason}")
        _merge(self.source, self.folder, parts, self.normalises)


def _plan(source: Source, shard_size: int) -> dict[str, Any]:
    """The description of a job: two jobs with equal plans write equal files."""
    digest = hashlib.sha256()
    for item in source.scan.items:
        digest.update(f"{item.path}\0{item.label}\n".encode(errors="surrogateescape"))
    plan = {"format": FORMAT, "files": len(source.scan.items), "files_sha256": digest.hexdigest()}
    plan |= {"shard_size": shard_size, "class_names": source.scan.class_names, **source.manifest_fields}
    return json.loads(json.dumps(plan))


def _write_shard(
    source: Source,
    folder: Path,
    number: int,
    items: Sequence[Item],
    progress: Callable[[int], Any],
    normalises: bool = False,
) -> dict[str, Any]:
    """Writes a shard and returns its part: what the index and the manifest contain of it."""
    manifest_fields, path = source.manifest_fields, folder / _shard_name(number)
    labels, crc32, names, skipped = [], [], [], []
    error_squares, noise_squares = 0.0, 0.0
    channels = ChannelSums(manifest_fields["shape"][0])
    with atomic_write(path) as file:
        file.seek(len(npy_header((0,), "uint8")))
        for item, record, reason in source.records(items):
            if record is None:
                skipped.append((item.path, reason))
            else:
                with np.errstate(over="ignore"):  # reported below
                    stored = record.astype(manifest_fields["dtype"])
                if not np.isfinite(stored).all():
                    remedy = (
                        "store as float32 (--dtype float32)" if np.isfinite(record).all() else "check the autoencoder"
                    )
                    raise EncodeError(f"{item.path}: its latent is not finite as {manifest_fields['dtype']}; {remedy}")
                if manifest_fields["stochastic"]:
                    error_squares += float(np.square(stored[:, 0].astype(np.float32) - record[:, 0]).mean())
                    noise_squares += float(np.exp(record[:, 1]).mean())
                if normalises:
                    channels.add(stored, manifest_fields["stochastic"])
                data = stored.tobytes()
                file.write(data)
                labels.append(item.label)
                crc32.append(zlib.crc32(data))
                names.append(item.path)
            progress(1)
            watchdog.touch()
        file.seek(0)
        file.write(npy_header((len(labels), *_record_shape(manifest_fields)), manifest_fields["dtype"]))
    part: dict[str, Any] = {
        "sha256": sha256_of(path),
        "labels": labels,
        "crc32": crc32,
        "names": names,
        "skipped": skipped,
    }
    part |= {"error_squares": error_squares, "noise_squares": noise_squares}
    return part | ({SUMS: channels.to_json()} if normalises else {})


def record_bytes(manifest_fields: dict[str, Any]) -> int:
    """Bytes of a record of a source with these fields of the manifest."""
    return math.prod(_record_shape(manifest_fields)) * np.dtype(manifest_fields["dtype"]).itemsize


def _record_shape(manifest_fields: dict[str, Any]) -> tuple[int, ...]:
    return 1 + (manifest_fields["mirror"] == "stored"), 1 + manifest_fields["stochastic"], *manifest_fields["shape"]


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.npy"


def _merge(source: Source, folder: Path, parts: list[dict[str, Any]], normalises: bool = False) -> None:
    """Writes the index and the manifest."""
    fields = dict(source.manifest_fields)
    if normalises:
        sums = ChannelSums.total(part[SUMS] for part in parts)
        fields["scale"], fields["shift"] = sums.normalisation(fields["scale"][0])
        fields["autoencoder"] = fields["autoencoder"] | {"normalisation": COMPUTED}
    skipped = [*source.scan.skipped, *(tuple(pair) for part in parts for pair in part["skipped"])]
    labels, crc32, names = ([value for part in parts for value in part[key]] for key in ("labels", "crc32", "names"))
    encoded = [os.fsencode(name) for name in names]
    index: dict[str, np.ndarray] = {
        "labels": np.array(labels, np.int32),
        "crc32": np.array(crc32, np.uint32),
        "names": np.frombuffer(b"".join(encoded), np.uint8),
        "name_ends": np.cumsum([len(name) for name in encoded]),
    }
    data = save(index)
    write_bytes(folder / INDEX, data)
    noise = sum(part["noise_squares"] for part in parts)
    error = sum(part["error_squares"] for part in parts)
    manifest = Manifest(
        format=FORMAT,
        class_names=source.scan.class_names,
        rounding=math.sqrt(error / noise) if noise else None,
        index_sha256=hashlib.sha256(data).hexdigest(),
        shards=tuple(
            Shard(_shard_name(number), len(part["labels"]), part["sha256"]) for number, part in enumerate(parts)
        ),
        skipped=tuple(sorted(skipped)),
        **fields,
    )
    empty = set(range(len(manifest.class_names))) - set(labels)
    for label in sorted(empty):
        logger.warning("class %r has no readable file", manifest.class_names[label])
    write_text(folder / MANIFEST, manifest.to_json())
