"""Copies latent shards to a local disk of the node, once for all processes of the node."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
from pathlib import Path

from megapromoe.data.latents import LatentsError, Manifest
from megapromoe.distributed import watchdog
from megapromoe.io import atomic_write, open_regular
from megapromoe.work_progress import Progress

logger = logging.getLogger(__name__)


def cache_shards(folder: Path, cache: Path, manifest: Manifest) -> Path:
    """Copies the shards of `folder` that are not in the cache yet; returns the folder of the copies below `cache`.

    All processes of a node may call it: one copies, the others wait for a lock. A copy gets its final name after its
    SHA-256 has been compared with the manifest. Each set of latents has its own folder, named by the SHA-256 of its
    index, so that copies of other latents are kept.

    Raises CacheError: a shard cannot be read or is damaged, or the disk is full.
    """
    copies = Path(cache) / manifest.index_sha256[:16]
    try:
        copies.mkdir(parents=True, exist_ok=True)
        with open(open_regular(copies / "lock", os.O_RDWR | os.O_CREAT)) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            missing = [shard for shard in manifest.shards if not (copies / shard.file).exists()]
            total = sum(shard.records * manifest.record_bytes for shard in missing)
            with Progress(total, "B", f"copying to {cache}") as progress:
                for shard in missing:
                    _copy(folder / shard.file, copies / shard.file, shard.sha256, progress)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "choose a larger disk" if full else "choose another folder"
        raise CacheError(
            f"data.cache = {str(cache)!r}: {error.strerror}: {error.filename or copies}; {remedy}, or remove data.cache"
        ) from error
    return copies


class CacheError(LatentsError):
    """A shard cannot be copied on this node."""


def _copy(source: Path, target: Path, sha256: str, progress: Progress) -> None:
    digest = hashlib.sha256()
    try:
        with open(source, "rb") as read, atomic_write(target) as write:
            while block := read.read(1 << 20):
                digest.update(block)
                write.write(block)
                progress.update(len(block))
                watchdog.touch()
            if digest.hexdigest() != sha256:
                raise CacheError(
                    f"{source}: its SHA-256 differs from that in the manifest; `megapromoe data check {source.parent}`"
                    " lists the damaged records; training without data.cache skips them"
                )
    except OSError as error:
        error.filename = error.filename or str(target)
        raise
