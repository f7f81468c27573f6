"""The job that writes latents: records from images (or any other `Source`) into shards, by many ranks.

Shard k is made of files [k * n, (k + 1) * n) of the source's order, n = `shard_size`; ranks take shards in turn. So the
output is the same, byte for byte, for any number of ranks, and a job that was killed goes on with the first shard that
is not finished. Ranks meet in the folder alone: each leaves `part-K.json` beside its shard K, and rank 0, once all are
there, writes the index and, last, the manifest. Source files that cannot be read are left out and listed.
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
PART_HASH = "part_sha256"  # in a part: the hash of all the rest of it; earlier versions wrote none
PART = {"sha256", "labels", "crc32", "names", "skipped", "error_squares", "noise_squares"}  # keys of that rest
SHARD_SIZE = 32768  # files: 1.07 GB of the SD-VAE's latents at 256 x 256
POLL = 0.5  # seconds between looks at what other ranks have finished


class EncodeError(UserError):
    """Latents that cannot be written, or must not be."""


class Source(Protocol):
    """Where records come from."""

    scan: Scan
    facts: dict[str, Any]
    """Fields of the manifest: shape, dtype, mirror, stochastic, scale, shift, autoencoder, resolution, crop."""

    def records(self, items: Sequence[Item]) -> Iterator[tuple[Item, np.ndarray | None, str]]:
        """Of each item in order: its raw record float32 (views, parts, C, H, W), or None and the reason."""


class EncodedImages:
    """Images through an autoencoder: the posterior of the image and of its mirror image.

    Args:
        batch: images encoded at once.
        workers: threads that read images meanwhile.
        dtype: "float16" or "float32", as which latents are stored; pixels are bytes.
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
        self.facts: dict[str, Any] = {
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
        # Batches end with the shard: an autoencoder's last bits may depend on how many images it is given at once.
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
            return read_image(self.folder / item.path, self.facts["resolution"], self.autoencoder.channels)
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
    patience: float = 3600.0,
    progress: Callable[[int], Any] | None = None,
) -> Manifest | None:
    """Writes the latents of `source` into `folder`; repeated, it goes on where it was. Every rank calls it alike.

    Args:
        shard_size: files of the source that make a shard.
        patience: seconds that rank 0 waits for other ranks to finish another shard before it gives up.
        progress: told how many more files are done: on rank 0 of all ranks, on others of their own.

    Returns:
        The manifest on rank 0, None on others.

    Raises EncodeError: the folder holds other things or the latents of another source, a record is not finite, or a
    rank is missing. ImageError: no file of the source could be read.
    """
    folder, progress = Path(folder), progress or (lambda _: None)
    plan = _plan(source, shard_size)
    with _owned(folder, plan, rank, world, patience) as done:
        if done:
            progress(len(source.scan.items))
            return read_manifest(folder) if rank == 0 else None
        shards = math.ceil(len(source.scan.items) / shard_size)
        told = _Told(folder, source, shard_size, shards, progress if rank == 0 else None)
        for number in range(rank, shards, world):
            items = source.scan.items[number * shard_size : (number + 1) * shard_size]
            watchdog.at(f"shard {number + 1} of {shards} of {folder}")
            if _part(folder, number) is None:
                _write_shard(source, folder, number, items, told.own if rank == 0 else progress)
                logger.info("%s: shard %d of %d", folder, number + 1, shards)
            elif rank:
                progress(len(items))
            told.others()
        if rank:
            return None
        watchdog.at(f"waiting for the other ranks' shards of {folder}")
        _wait(folder, shards, patience, told)
        watchdog.at(f"writing the index of {folder}")
        return _merge(source, folder, shards)


def _plan(source: Source, shard_size: int) -> dict[str, Any]:
    """What a job writes, such that two jobs with the same plan write the same."""
    digest = hashlib.sha256()
    for item in source.scan.items:
        digest.update(f"{item.path}\0{item.label}\n".encode(errors="surrogateescape"))
    plan = {"format": FORMAT, "files": len(source.scan.items), "files_sha256": digest.hexdigest()}
    plan |= {"shard_size": shard_size, "class_names": source.scan.class_names, **source.facts}
    return json.loads(json.dumps(plan))


@contextlib.contextmanager
def _owned(folder: Path, plan: dict[str, Any], rank: int, world: int, patience: float) -> Iterator[bool]:
    """While this job may write; yields whether all is done already. Rank 0 puts the plan there, others find it.

    A job of one rank that fails before its first shard is finished leaves nothing. Of several ranks others may still be
    writing, so that the plan stays.
    """
    path = folder / PLAN
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(not path.name.endswith(SUFFIX) for path in folder.iterdir()):
                raise EncodeError(f"{folder} holds other things; give an empty or a new folder")
            write_json(path, plan, indent=1)
    deadline = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > deadline:
            raise EncodeError(f"{path}: rank 0 has not begun in {patience:g} s; start all ranks on one shared folder")
        time.sleep(POLL)
    try:
        before = json.loads(path.read_bytes())
        if not isinstance(before, dict):
            raise ValueError("it holds no object")
    except (ValueError, RecursionError) as error:
        raise EncodeError(f"{path} is damaged: {error}; take it from a copy, or encode into a new folder") from error
    if different := sorted(key for key in before.keys() | plan.keys() if before.get(key) != plan.get(key)):
        told = ", ".join(f"{key} was {_short(before.get(key))}, is {_short(plan.get(key))}" for key in different)
        unused = ", or remove this one, of which no shard is finished" if _is_unused(folder) else ""
        raise EncodeError(
            f"{folder} was begun from something else: {told}; repeat that command, or give another folder{unused}"
        )
    with open(path) as file:
        if rank == 0:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise EncodeError(f"{folder}: another job is writing here; wait for it, or stop it") from error
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
    """Writes shard and part; the part, written last, is what says that the shard is finished."""
    facts, path = source.facts, folder / _shard_name(number)
    labels, crc32, names, skipped = [], [], [], []
    error_squares, noise_squares = 0.0, 0.0
    with atomic_write(path) as file:
        file.seek(len(npy_header((0,), "uint8")))
        for item, record, reason in source.records(items):
            if record is None:
                skipped.append((item.path, reason))
            else:
                with np.errstate(over="ignore"):  # told below
                    stored = record.astype(facts["dtype"])
                if not np.isfinite(stored).all():
                    remedy = (
                        "store as float32 (--dtype float32)" if np.isfinite(record).all() else "see to the autoencoder"
                    )
                    raise EncodeError(f"{item.path}: its latent is not finite as {facts['dtype']}; {remedy}")
                if facts["stochastic"]:
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
        file.write(npy_header((len(labels), *_record_shape(facts)), facts["dtype"]))
    part: dict[str, Any] = {
        "sha256": sha256_of(path),
        "labels": labels,
        "crc32": crc32,
        "names": names,
        "skipped": skipped,
    }
    part |= {"error_squares": error_squares, "noise_squares": noise_squares}
    write_json(folder / _part_name(number), part | {PART_HASH: sha256_of_json(part)})


def record_bytes(facts: dict[str, Any]) -> int:
    """Bytes of a record of a source with these facts."""
    return math.prod(_record_shape(facts)) * np.dtype(facts["dtype"]).itemsize


def _record_shape(facts: dict[str, Any]) -> tuple[int, ...]:
    return 1 + (facts["mirror"] == "stored"), 1 + facts["stochastic"], *facts["shape"]


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.npy"


def _part_name(number: int) -> str:
    return f"part-{number:05d}.json"


def _part(folder: Path, number: int) -> dict[str, Any] | None:
    """What a rank left of a finished shard; None before that, and, with a warning, if it is damaged."""
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
    logger.warning("%s is damaged; its shard is made again", path)
    return None


class _Told:
    """Tells rank 0's `progress` of every file once, whichever rank it was done by."""

    def __init__(
        self, folder: Path, source: Source, shard_size: int, shards: int, progress: Callable[[int], Any] | None
    ):
        self.folder, self.progress, self.left = folder, progress, set(range(shards))
        self.sizes = [min(shard_size, len(source.scan.items) - k * shard_size) for k in range(shards)]
        self.early = 0  # files of the shard in work, already told

    def own(self, count: int) -> None:
        self.early += count
        if self.progress is not None:
            self.progress(count)

    def others(self) -> int:
        """Looks for shards newly finished; returns how many are left."""
        if self.progress is not None:
            for number in sorted(k for k in self.left if (self.folder / _part_name(k)).exists()):
                self.left.discard(number)
                known, self.early = (
                    min(self.early, self.sizes[number]),
                    self.early - min(self.early, self.sizes[number]),
                )
                self.progress(self.sizes[number] - known)
        return len(self.left)


def _wait(folder: Path, shards: int, patience: float, told: _Told) -> None:
    """Until every shard is finished."""
    left, since = shards, time.monotonic()
    while missing := [number for number in range(shards) if not (folder / _part_name(number)).exists()]:
        told.others()
        if len(missing) < left:
            left, since = len(missing), time.monotonic()
        if time.monotonic() - since > patience:
            raise EncodeError(
                f"{folder}: nothing new in {patience:g} s, {len(missing)} shards are missing, the first"
                f" {_shard_name(missing[0])}; a rank has died: repeat the command"
            )
        time.sleep(POLL)
    told.others()


def _merge(source: Source, folder: Path, shards: int) -> Manifest:
    """Index and manifest from the parts, which then go."""
    parts = []
    for number in range(shards):
        part = _part(folder, number)
        if part is None:
            raise EncodeError(f"{folder / _shard_name(number)} or its part is gone or damaged; repeat the command")
        parts.append(part)
    skipped = [*source.scan.skipped, *(tuple(pair) for part in parts for pair in part["skipped"])]
    labels, crc32, names = ([value for part in parts for value in part[key]] for key in ("labels", "crc32", "names"))
    if not labels:
        first, reason = skipped[-1]
        for number in range(shards):  # another try is to read the files again
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
        **source.facts,
    )
    empty = set(range(len(manifest.class_names))) - set(labels)
    for label in sorted(empty):
        logger.warning("class %r has no readable file", manifest.class_names[label])
    write_text(folder / MANIFEST, manifest.to_json())
    for number in range(shards):
        (folder / _part_name(number)).unlink()
    for left in folder.glob(f"*{SUFFIX}"):
        left.unlink()
    return manifest
