"""The encoding job: many ranks write the records of images (or of another `Source`) into latent shards.

Shard k holds the files [k * n, (k + 1) * n) of the source, n = `shard_size`; the ranks take shards in turn. So the
output has the same bytes for any number of ranks, and a job that was killed resumes with its first unfinished shard.
The ranks communicate through files in the folder only: each writes `part-K.json` next to its shard K; when all exist,
rank 0 writes the index and finally the manifest. Source files that cannot be read are skipped and listed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.numpy import save

from megapromoe.data.autoencoder import Autoencoder
from megapromoe.data.images import ImageError, Item, Scan, read_image
from megapromoe.data.latents import FORMAT, INDEX, MANIFEST, Manifest, Shard, npy_header, read_manifest
from megapromoe.distributed import watchdog
from megapromoe.errors import UserError
from megapromoe.io import SUFFIX, atomic_write, sha256_of, sha256_of_json, write_bytes, write_json, write_text

logger = logging.getLogger(__name__)

PLAN = "plan.json"
PART_HASH = "part_sha256"  # key of a part: the hash of its other keys; earlier versions did not write it
PART = {"sha256", "labels", "crc32", "names", "skipped", "error_squares", "noise_squares"}  # the other keys
SHARD_SIZE = 32768  # files; 1.07 GB for latents of the SD-VAE at 256 x 256
POLL = 0.5  # seconds between checks for the parts of other ranks


class EncodeError(UserError):
    """Latents cannot be written, or would mix with other data."""


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
    """

    def __init__(
        self,
        folder: Path,
        scan: Scan,
        autoencoder: Autoencoder,
        resolution: int,
        batch: int = 32,
        workers: int = 1,
        dtype: str = "float16",
    ):
        self.folder, self.scan, self.autoencoder = Path(folder), scan, autoencoder
        self.batch, self.workers, self.pixels = batch, workers, autoencoder.identity["kind"] == "pixels"
        self.manifest_fields: dict[str, Any] = {
            "shape": autoencoder.latent_shape(resolution),
            "dtype": "uint8" if self.pixels else dtype,
            "mirror": "exact" if self.pixels else "stored",
            "stochastic": autoencoder.stochastic,
            "scale": autoencoder.scale,
            "shift": autoencoder.shift,
            "autoencoder": autoencoder.identity,
            "resolution": resolution,
            "crop": "adm centre crop",
        }

    def records(self, items: Sequence[Item]) -> Iterator[tuple[Item, np.ndarray | None, str]]:
        """See `Source.records`."""
        # Batches do not cross shards: the last bits of an autoencoder's output may depend on the batch size.
        batches = [items[i : i + self.batch] for i in range(0, len(items), self.batch)]
        with ThreadPoolExecutor(self.workers, thread_name_prefix="images") as pool:
            ahead = [pool.submit(self._read, item) for item in batches[0]] if batches else []
            for number, batch in enumerate(batches):
                images = [future.result() for future in ahead]
                ahead = (
                    [pool.submit(self._read, item) for item in batches[number + 1]] if batch is not batches[-1] else []
                )
                good = [image for image in images if not isinstance(image, str)]
                encoded = iter(self._encode(np.stack(good))) if good else iter(())
                for item, image in zip(batch, images, strict=True):
                    yield (item, None, image) if isinstance(image, str) else (item, next(encoded), "")

    def _read(self, item: Item) -> np.ndarray | str:
        try:
            return read_image(self.folder / item.path, self.manifest_fields["resolution"], self.autoencoder.channels)
        except ImageError as error:
            return str(error)

    def _encode(self, images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(images).float() / 127.5 - 1
        views = []
        for view in (x,) if self.pixels else (x, x.flip(-1)):
            parts = [part for part in self.autoencoder.encode(view) if part is not None]
            views.append(torch.stack(parts, dim=1))
        return torch.stack(views, dim=1).cpu().numpy()


def encode(
    source: Source,
    folder: Path,
    rank: int = 0,
    world: int = 1,
    shard_size: int = SHARD_SIZE,
    wait_timeout: float = 3600.0,
    progress: Callable[[int], Any] | None = None,
) -> Manifest | None:
    """Writes the latents of `source` into `folder`, or resumes an interrupted job. All ranks call it.

    Args:
        source: the records.
        folder: of the latents; shared by all ranks.
        rank, world: this rank and the number of ranks.
        shard_size: files of the source per shard.
        wait_timeout: seconds without a newly finished shard after which rank 0 stops waiting for other ranks.
        progress: called with the number of newly finished files: on rank 0 of all ranks, elsewhere of this rank.

    Returns:
        The manifest on rank 0, None on other ranks.

    Raises:
        EncodeError: the folder holds other files or latents of another source, a record is not finite, or a rank is
            missing.
        ImageError: no file of the source can be read.
    """
    folder, progress = Path(folder), progress or (lambda _: None)
    plan = _plan(source, shard_size)
    with _exclusive_folder(folder, plan, rank, world, wait_timeout) as done:
        if done:
            progress(len(source.scan.items))
            return read_manifest(folder) if rank == 0 else None
        shards = math.ceil(len(source.scan.items) / shard_size)
        progress_of_job = _JobProgress(folder, source, shard_size, shards, progress if rank == 0 else None)
        for number in range(rank, shards, world):
            items = source.scan.items[number * shard_size : (number + 1) * shard_size]
            watchdog.at(f"shard {number + 1} of {shards} of {folder}")
            if _read_part(folder, number) is None:
                _write_shard(source, folder, number, items, progress_of_job.add_own if rank == 0 else progress)
                logger.info("%s: shard %d of %d", folder, number + 1, shards)
            elif rank:
                progress(len(items))
            progress_of_job.add_finished_shards()
        if rank:
            return None
        watchdog.at(f"waiting for the other ranks' shards of {folder}")
        _wait_for_shards(folder, shards, wait_timeout, progress_of_job)
        watchdog.at(f"writing the index of {folder}")
        return _merge(source, folder, shards)


def _plan(source: Source, shard_size: int) -> dict[str, Any]:
    """The description of a job: two jobs with equal plans write equal files."""
    digest = hashlib.sha256()
    for item in source.scan.items:
        digest.update(f"{item.path}\0{item.label}\n".encode(errors="surrogateescape"))
    plan = {"format": FORMAT, "files": len(source.scan.items), "files_sha256": digest.hexdigest()}
    plan |= {"shard_size": shard_size, "class_names": source.scan.class_names, **source.manifest_fields}
    return json.loads(json.dumps(plan))


@contextlib.contextmanager
def _exclusive_folder(folder: Path, plan: dict[str, Any], rank: int, world: int, wait_timeout: float) -> Iterator[bool]:
    """Gives this job exclusive access to the folder; yields whether the latents are complete already.

    Rank 0 writes the plan and holds a lock on it; the other ranks wait for the plan and compare it with theirs. A job
    of one rank that fails before its first shard is finished removes the plan. With several ranks the plan is kept,
    because others may still be writing.
    """
    path = folder / PLAN
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(not path.name.endswith(SUFFIX) for path in folder.iterdir()):
                raise EncodeError(f"{folder} holds other files; give an empty or a new folder")
            write_json(path, plan, indent=1)
    deadline = time.monotonic() + wait_timeout
    while not path.exists():
        if time.monotonic() > deadline:
            raise EncodeError(
                f"{path}: rank 0 has not written it within {wait_timeout:g} s; start all ranks on one shared folder"
            )
        time.sleep(POLL)
    try:
        before = json.loads(path.read_bytes())
        if not isinstance(before, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise EncodeError(f"{path} is damaged: {error}; take it from a copy, or encode into a new folder") from error
    if different := sorted(key for key in before.keys() | plan.keys() if before.get(key) != plan.get(key)):
        changes = ", ".join(f"{key} was {_short(before.get(key))}, is {_short(plan.get(key))}" for key in different)
        unused = ", or remove this one, in which no shard is finished" if _is_unused(folder) else ""
        raise EncodeError(
            f"{folder} was started with other settings or images: {changes}; repeat the first command, or give another"
            f" folder{unused}"
        )
    with open(path) as file:
        if rank == 0:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise EncodeError(f"{folder}: another job is writing to it; wait for that job, or stop it") from error
        try:
            yield (folder / MANIFEST).exists()
        except Exception:
            if world == 1 and _is_unused(folder):
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise


def _is_unused(folder: Path) -> bool:
    """Whether no job has finished a shard in the folder."""
    return not (folder / MANIFEST).exists() and not any(folder.glob("part-*.json"))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _write_shard(
    source: Source, folder: Path, number: int, items: Sequence[Item], progress: Callable[[int], Any]
) -> None:
    """Writes a shard and then its part file, whose existence marks the shard as finished."""
    manifest_fields, path = source.manifest_fields, folder / _shard_name(number)
    labels, crc32, names, skipped = [], [], [], []
    error_squares, noise_squares = 0.0, 0.0
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
    write_json(folder / _part_name(number), part | {PART_HASH: sha256_of_json(part)})


def record_bytes(manifest_fields: dict[str, Any]) -> int:
    """Bytes of a record of a source with these fields of the manifest."""
    return math.prod(_record_shape(manifest_fields)) * np.dtype(manifest_fields["dtype"]).itemsize


def _record_shape(manifest_fields: dict[str, Any]) -> tuple[int, ...]:
    return 1 + (manifest_fields["mirror"] == "stored"), 1 + manifest_fields["stochastic"], *manifest_fields["shape"]


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.npy"


def _part_name(number: int) -> str:
    return f"part-{number:05d}.json"


def _read_part(folder: Path, number: int) -> dict[str, Any] | None:
    """The part file of a finished shard; None if the shard is not finished, or, with a warning, if it is damaged."""
    path = folder / _part_name(number)
    if not (folder / _shard_name(number)).exists() or not path.exists():
        return None
    try:
        part = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        part = None
    if isinstance(part, dict):
        digest = part.pop(PART_HASH, None)
        if part.keys() == PART and digest in (None, sha256_of_json(part)):
            return part
    logger.warning("%s is damaged; its shard is written again", path)
    return None


class _JobProgress:
    """Reports every file of the job once to rank 0's `progress`, no matter which rank has encoded it."""

    def __init__(
        self, folder: Path, source: Source, shard_size: int, shards: int, progress: Callable[[int], Any] | None
    ):
        self.folder, self.progress, self.unfinished = folder, progress, set(range(shards))
        self.sizes = [min(shard_size, len(source.scan.items) - k * shard_size) for k in range(shards)]
        self.own_current = 0  # reported files of this rank's current shard

    def add_own(self, count: int) -> None:
        """Reports `count` files of this rank."""
        self.own_current += count
        if self.progress is not None:
            self.progress(count)

    def add_finished_shards(self) -> None:
        """Reports the files of newly finished shards that have not been reported yet."""
        if self.progress is None:
            return
        for number in sorted(k for k in self.unfinished if (self.folder / _part_name(k)).exists()):
            self.unfinished.discard(number)
            reported = min(self.own_current, self.sizes[number])
            self.own_current -= reported
            self.progress(self.sizes[number] - reported)


def _wait_for_shards(folder: Path, shards: int, wait_timeout: float, progress_of_job: _JobProgress) -> None:
    """Waits until every shard is finished. Raises EncodeError after `wait_timeout` seconds without a new one."""
    remaining, since = shards, time.monotonic()
    while missing := [number for number in range(shards) if not (folder / _part_name(number)).exists()]:
        progress_of_job.add_finished_shards()
        if len(missing) < remaining:
            remaining, since = len(missing), time.monotonic()
        if time.monotonic() - since > wait_timeout:
            raise EncodeError(
                f"{folder}: no shard was finished within {wait_timeout:g} s, {len(missing)} shards are missing, the"
                f" first {_shard_name(missing[0])}; another rank may have ended: repeat the command"
            )
        time.sleep(POLL)
    progress_of_job.add_finished_shards()


def _merge(source: Source, folder: Path, shards: int) -> Manifest:
    """Writes the index and the manifest from the part files, and then removes these."""
    parts = []
    for number in range(shards):
        part = _read_part(folder, number)
        if part is None:
            raise EncodeError(
                f"{folder / _shard_name(number)} or its part file is missing or damaged; repeat the command"
            )
        parts.append(part)
    skipped = [*source.scan.skipped, *(tuple(pair) for part in parts for pair in part["skipped"])]
    labels, crc32, names = ([value for part in parts for value in part[key]] for key in ("labels", "crc32", "names"))
    if not labels:
        first, reason = skipped[-1]
        for number in range(shards):  # so that the next attempt reads the files again
            (folder / _part_name(number)).unlink()
            (folder / _shard_name(number)).unlink()
        (folder / PLAN).unlink(missing_ok=True)
        raise ImageError(f"none of {len(source.scan.items)} files could be read; {first}: {reason}")
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
        **source.manifest_fields,
    )
    empty = set(range(len(manifest.class_names))) - set(labels)
    for label in sorted(empty):
        logger.warning("class %r has no readable file", manifest.class_names[label])
    write_text(folder / MANIFEST, manifest.to_json())
    for number in range(shards):
        (folder / _part_name(number)).unlink()
    for unfinished in folder.glob(f"*{SUFFIX}"):
        unfinished.unlink()
    return manifest
